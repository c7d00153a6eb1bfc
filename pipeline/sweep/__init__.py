"""Sweeps: many trials of one study, run through Ray Tune, resumed by the same command.

`trials` names them, `ledger` remembers how they ended, `resources` says how many run at once, `tuning` is the
door to Ray Tune, `work` what a trial's process does, `leaderboard` what comes out, `study` the driver of it all.
"""

from pipeline.sweep.study import Study

__all__ = ["Study"]
