"""What a sweep remembers of its trials beside their run directories: how each ended, and its rungs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.engine import execute as stages
from pipeline.store.files import read_json, write_json
from pipeline.sweep.definition import Sweep
from pipeline.sweep.trials import Trial

STATE = "state.json"


@dataclass(frozen=True)
class Entry:
    """state: new, running, finished, stopped (early), failed or interrupted; rungs: [step, bound, Unix ms]."""

    state: str = "new"
    reason: str = ""
    label: str = ""
    run: str = ""
    rungs: tuple[tuple[int, float, int], ...] = ()


@dataclass
class Ledger:
    """state.json, written at every change; the driver is its only writer."""

    path: Path
    early_stop: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)

    @staticmethod
    def open(folder: Path, sweep: Sweep) -> Ledger:
        """What the last command left. Rungs of other settings are forgotten: they compare nothing."""
        ledger = Ledger(folder / STATE, config.to_dict(sweep.early_stop))
        if ledger.path.exists():
            content = read_json(ledger.path)
            for key, facts in content["trials"].items():
                entry = Entry(**{**facts, "rungs": tuple(map(tuple, facts["rungs"]))})
                if content["early_stop"] != ledger.early_stop:
                    entry = replace(entry, rungs=(), state="new" if entry.state == "stopped" else entry.state)
                ledger.entries[key] = entry
        return ledger

    def of(self, key: str) -> Entry:
        return self.entries.get(key, Entry())

    def has_ended(self, key: str) -> bool:
        """Whether the same command leaves the trial alone."""
        return self.of(key).state in ("finished", "stopped")

    def note(self, trial: Trial, state: str, reason: str = "") -> None:
        self.entries[trial.key] = replace(
            self.of(trial.key), state=state, reason=reason, label=trial.label, run=trial.run.path.name
        )
        self.save()

    def note_rung(self, key: str, step: int, value: float) -> None:
        """A rung that is reported again after an interruption keeps its first time."""
        entry = self.of(key)
        if step not in {rung[0] for rung in entry.rungs}:
            rung = (step, value, time.time_ns() // 1_000_000)
            self.entries[key] = replace(entry, rungs=(*entry.rungs, rung))
            self.save()

    def stop(self, key: str, step: int) -> None:
        """The trial was judged not worth going on; noted at once, since nothing else would say why it ended."""
        self.entries[key] = replace(self.of(key), state="stopped", reason=f"stopped early at {step} steps")
        self.save()

    def save(self) -> None:
        trials = {key: entry.__dict__ for key, entry in self.entries.items()}
        write_json(self.path, {"early_stop": self.early_stop, "trials": trials})

    def judge(self, trials: list[Trial]) -> None:
        """Bring the states into line with the files: a run directory has the last word."""
        for trial in trials:
            entry = self.of(trial.key)
            if not stages.pending(trial.experiment, trial.run, "report"):
                state, reason = "finished", ""
            elif entry.state in ("finished", "running"):  # its files went, or its driver did
                state, reason = "interrupted", ""
            else:
                state, reason = entry.state, entry.reason
            self.entries[trial.key] = replace(
                entry, state=state, reason=reason, label=trial.label, run=trial.run.path.name
            )
