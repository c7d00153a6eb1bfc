"""The states of a study's trials, kept in state.json."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from pipeline import config
from pipeline.config.checks import Tree
from pipeline.engine.plan import list_unfinished_stages
from pipeline.store.files import read_record, write_json
from pipeline.sweep.definition import EarlyStop
from pipeline.sweep.points import Trial

FILE = "state.json"
State = Literal["new", "running", "finished", "stopped", "failed", "interrupted"]  # stopped: early, at a rung


class TrialState(TypedDict):
    """State of one trial. label, run: for people who read the file; rungs: (step, bound, Unix ms)."""

    state: State
    reason: str
    label: str
    run: str
    rungs: list[tuple[int, float, int]]


class StudyFile(TypedDict, total=False):
    early_stop: Tree
    trials: dict[str, TrialState]


def count_sharing_trials(folder: Path, slots: int) -> int:
    """Return how many trials share the cluster, by the study's state file: those that run or wait, and fit at once."""
    trials = read_record(folder / FILE, StudyFile).get("trials", {}).values()
    left = sum(trial["state"] in ("new", "running", "interrupted") for trial in trials)
    return max(1, min(left, slots))


class TrialStates:
    """States of all trials, which the driver writes to state.json at every change.

    They begin with that file, corrected by the run directories; rungs of other settings are not comparable and dropped.
    """

    def __init__(self, folder: Path, early_stop: EarlyStop, trials: Iterable[Trial]):
        self.path, self.early_stop = folder / FILE, config.to_dict(early_stop)
        content = read_record(self.path, StudyFile)
        self.records = content.get("trials", {})
        if content.get("early_stop") != self.early_stop:
            for record in self.records.values():
                record["rungs"] = []
                record["state"] = "new" if record["state"] == "stopped" else record["state"]
        for trial in trials:
            new = TrialState(state="new", reason="", label="", run="", rungs=[])
            record = self.records.setdefault(trial.key, new)
            record["label"], record["run"] = trial.label, trial.place.name
            if not list_unfinished_stages(trial.place, "report"):
                record["state"], record["reason"] = "finished", ""
            elif record["state"] in ("finished", "running"):  # files deleted, or driver killed
                record["state"], record["reason"] = "interrupted", ""

    def is_done(self, key: str) -> bool:
        return self.records[key]["state"] in ("finished", "stopped")

    def set_state(self, key: str, state: State, reason: str = "") -> None:
        record = self.records[key]
        record["state"], record["reason"] = state, reason
        self._save()

    def add_rung(self, key: str, step: int, bound: float) -> None:
        """Record the bound at a rung, once: a resumed trial reports it again, and the first time stays."""
        rungs = self.records[key]["rungs"]
        if step not in [rung[0] for rung in rungs]:
            rungs.append((step, bound, time.time_ns() // 1_000_000))
            self._save()

    def _save(self) -> None:
        write_json(self.path, {"early_stop": self.early_stop, "trials": self.records})
