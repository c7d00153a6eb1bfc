"""What becomes of the trials while they run: noted, mirrored, ranked, said."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import config, tracking
from pipeline.console import duration, say
from pipeline.engine import execute as stages
from pipeline.scores.metrics import format_headline
from pipeline.store.files import write_text
from pipeline.store.log import read_progress
from pipeline.sweep import leaderboard
from pipeline.sweep.definition import Sweep
from pipeline.sweep.leaderboard import Leaderboard
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.trials import Trial

AFTER_TRAINING = ("sample", "evaluate", "figures", "report")
LONGEST = 300  # characters of a reason; libraries can be wordy
STATUS = {"finished": "FINISHED", "failed": "FAILED"}  # on the server; anything else was KILLED


class Board:
    """Told of every start and end, it keeps the sweep's folder and the tracking server up to date."""

    def __init__(
        self,
        sweep: Sweep,
        trials: dict[str, Trial],
        ledger: Ledger,
        folder: Path,
        uri: str,
        interrupted: Callable[[], bool],
        note: str = "",
    ):
        self.note = note
        self.sweep, self.trials, self.ledger, self.folder, self.uri = sweep, trials, ledger, folder, uri
        self.interrupted = interrupted
        self.parent = tracking.Parent(uri, sweep.name, folder.parent.parent, warn=say)
        self.mirrors: dict[str, tracking.Mirror] = {}  # of the trials that run
        self.began = time.monotonic()

    def open(self) -> None:
        """The parent runs; what a killed driver left on the server is put right, and what it owed delivered."""
        write_text(self.folder / "sweep.yaml", config.to_yaml(self.sweep))
        self.parent.start(self.folder / "sweep.yaml")
        self.parent.reconcile(set(self.trials))
        for key in self.trials:
            if self.ledger.of(key).state != "new":
                self._deliver(key)

    def _deliver(self, key: str) -> None:
        """Mirror a trial that does not run, where the server has not got all of it: its driver was killed, or it
        was made elsewhere."""
        mirror, state = self._mirror(key), self.ledger.of(key).state
        mirror.tags[tracking.STATE] = state
        mirror.status = STATUS.get(state, "KILLED")
        if mirror.is_outstanding:
            mirror.start()
            mirror.stop(STATUS.get(state, "KILLED"))

    def closed(self) -> bool:
        """Whether no further trial is to be started."""
        hours = self.sweep.budget.hours
        spent = hours is not None and time.monotonic() - self.began > 3600 * hours
        return spent or self.interrupted()

    def started(self, key: str) -> None:
        trial = self.trials[key]
        self.ledger.note(trial, "running")
        mirror = self.mirrors[key] = self._mirror(key)
        mirror.tags[tracking.STATE] = "running"
        mirror.start()
        say(f"{trial.label}: started")

    def ended(self, key: str, error: str | None) -> None:
        """The trial's files say how it ended, `error` only why."""
        trial, mirror = self.trials[key], self.mirrors.pop(key)
        state, reason = self._how(trial, error)
        self.ledger.note(trial, state, reason)
        mirror.tags |= {tracking.STATE: state, **({"sweep.reason": reason} if reason else {})}
        mirror.stop(STATUS.get(state, "KILLED"))
        row = next(row for row in self.publish().rows if row.trial.key == key)
        say(f"{trial.label}: {_outcome(row)}")

    def _how(self, trial: Trial, error: str | None) -> tuple[str, str]:
        if not stages.pending(trial.experiment, trial.run, "report"):
            return "finished", ""
        if self.ledger.of(trial.key).state == "stopped":
            return "stopped", self.ledger.of(trial.key).reason
        if error is None and self.interrupted():
            return "interrupted", ""
        return "failed", textwrap.shorten(
            error or "it ended before its work was done", LONGEST, placeholder=" ..."
        )

    def _mirror(self, key: str) -> tracking.Mirror:
        trial = self.trials[key]
        swept = {name: _text(trial, name) for name in trial.point.swept}
        child = tracking.Child(
            trial.label, {tracking.TRIAL: key, "sweep": self.sweep.name}, swept,
            self.folder / "tracking" / f"{key}.json",
        )  # fmt: skip
        tags = {"sweep": self.sweep.name, tracking.TRIAL: key, **swept}
        if self.parent.run_id:
            tags[tracking.PARENT] = self.parent.run_id
        return tracking.Mirror(self.uri, self.sweep.name, trial.experiment, trial.run, tags, say, child)

    def publish(self) -> Leaderboard:
        """The leaderboard as it is now, in the sweep's folder and on the server."""
        ranked = leaderboard.rank_trials(self.sweep, list(self.trials.values()), self.ledger)
        leaderboard.write(ranked, self.folder, self.note)
        tags: dict[str, str] = {}
        scores: dict[str, float] = {}
        if ranked.rows and ranked.rows[0].rank:
            best = ranked.rows[0]
            tags = {"best_trial": best.trial.label, "best_run": best.trial.run.path.name}
            tags |= {f"best.{key}": str(value) for key, value in best.trial.point.swept.items()}
            scores = {f"best/{self.sweep.rank.metric}": best.scores[self.sweep.rank.metric]}
        rungs = {key: list(self.ledger.of(key).rungs) for key in self.trials}
        note = leaderboard.to_markdown(ranked, self.note)
        standing = tracking.Standing(leaderboard.tabulate(ranked), note, (tags, scores), rungs)
        self.parent.publish(standing)
        return ranked

    def close(self, status: str) -> Leaderboard:
        """The leaderboard, the report and the last word to the server, however the sweep ended."""
        ranked = self.publish()
        self._write_report(ranked)
        self.parent.finish(status, self.folder / "report")
        return ranked

    def _write_report(self, ranked: Leaderboard) -> None:
        from pipeline.report import compare

        entries = [
            compare.Entry(row.trial.label, row.trial.run.of(row.trial.experiment), row.trial.point.swept)
            for row in ranked.rows
            if row.scores
        ]
        if entries:
            compare.write_comparison(
                entries, self.folder / "report", self.sweep.name, self.sweep.rank.by, self.note
            )

    def progress(self) -> tuple[int, str]:
        """How many trials have ended, and how far those are that run."""
        running = [self.trials[key] for key in list(self.mirrors)]
        notes = [f"{trial.label} {_under_way(trial)}" for trial in running]
        return sum(self.ledger.has_ended(key) for key in self.trials), "; ".join(notes)


def _under_way(trial: Trial) -> str:
    """The stage that a trial is in, told from its files; of training the step."""
    step, steps = read_progress(trial.run)[0], trial.experiment.train.steps
    ended = trial.run.seconds_by_stage()
    if step < steps or not ended:
        return f"{step}/{steps}"
    return next((stage for stage in AFTER_TRAINING if stage not in ended), "ends")


def _text(trial: Trial, key: str) -> str:
    """A swept value as the experiment has it: 0 is 0.0 where a number is meant, as in every other trial."""
    if key == "experiment":
        return str(trial.point.swept[key])
    section, _, inner = key.partition(".")
    tree: dict[str, Any] = config.to_dict(trial.experiment)
    return str(tree[section][inner] if inner else tree[section])


def _outcome(row: leaderboard.Row) -> str:
    if row.state != "finished":
        return f"failed: {row.reason}" if row.state == "failed" else row.reason or row.state
    return f"finished in {duration(row.seconds)}: {format_headline(row.scores)}"
