"""Studies: many trials of one sweep file, run through Ray Tune, resumed by the same command.

`definition` reads the file, `points` draws its space and finds the run of each point. `study` is the driver:
`ledger` remembers how trials ended, `resources` says how many run at once, `tuning` is the door to Ray Tune, `work`
what a trial's process does, `recorder` is told what becomes of it, `leaderboard` what comes out. `reproduce` scales
the paper's tables to what one has.
"""
