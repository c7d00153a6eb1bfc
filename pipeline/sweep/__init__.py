"""Sweeps: many trials of one study, run through Ray Tune, resumed by the same command.

`trials` names them, `ledger` remembers how they ended, `resources` says how many run at once, `tuning` is the
door to Ray Tune, `work` what a trial's process does, `board` is told what becomes of it, `leaderboard` what comes
out, `study` the driver of it all; `budget` scales the paper's tables to what one has.
"""

from pipeline.sweep.study import Study, reproduction

__all__ = ["Study", "reproduction"]
