"""Studies: the trials of a sweep file, run by Ray Tune; the same command resumes a study.

`definition` reads the file, `points` draws its space and makes the trials. `study` is the driver: `trial_states` are
kept in a file, `shares` divides the cluster, `tuning` calls Ray Tune, `trial` runs the stages of one, `recorder` tells
the server and the console, `leaderboard` ranks. `reproduction` scales the paper's tables to a budget.
"""
