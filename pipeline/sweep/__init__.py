"""Studies: the trials of a sweep file, run as Ray tasks; the same command resumes a study.

`definition` reads the file, `points` makes the trials, `study` drives them, `recorder` tells server and console.
"""
