"""What becomes of the trials while they run: noted in the ledger, mirrored to MLflow, ranked, said."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline import config, tracking
from pipeline.console import format_duration, print_line
from pipeline.engine.plan import list_unfinished_stages
from pipeline.scores.metrics import format_headline
from pipeline.store.files import write_text
from pipeline.store.log import read_progress
from pipeline.sweep import leaderboard
from pipeline.sweep.definition import Sweep
from pipeline.sweep.ledger import Ledger, State
from pipeline.sweep.points import Trial

AFTER_TRAINING = ("sample", "evaluate", "figures", "report")
LONGEST = 300  # characters of a reason; libraries can be wordy
STATUS = {"finished": "FINISHED", "failed": "FAILED"}  # on the server; anything else was KILLED


@dataclass
class Recorder:
    """Told of every start and end, it keeps the study's folder and the tracking server at `uri` up to date."""

    sweep: Sweep
    trials: dict[str, Trial]
    ledger: Ledger
    folder: Path
    uri: str
    interrupted: Callable[[], bool]

    def __post_init__(self) -> None:
        self.parent = tracking.ParentRun(
            self.uri, self.sweep.name, self.folder.parent.parent, warn=print_line
        )
        self.mirrors: dict[str, tracking.Mirror] = {}  # of the trials that run
        self.began = time.monotonic()

    def open(self) -> None:
        """Let the parent run; put right what a killed driver left on the server, and deliver what it owed."""
        write_text(self.folder / "sweep.yaml", config.to_yaml(self.sweep))
        self.parent.start(self.folder / "sweep.yaml", self.trials)
        for key in self.trials:
            state = self.ledger.records[key].state
            if state == "new":
                continue
            # The server may not have all of it: its driver was killed, or it was made elsewhere.
            mirror = self._mirror(key, state)
            mirror.status = status = STATUS.get(state, "KILLED")
            if not mirror.is_done:
                mirror.start()
                mirror.stop(status)

    def should_stop(self) -> bool:
        """Tell whether no further trial is to be started."""
        hours = self.sweep.budget.hours
        spent = hours is not None and time.monotonic() - self.began > 3600 * hours
        return spent or self.interrupted()

    def start_trial(self, key: str) -> None:
        self.ledger.record_state(key, "running")
        self.mirrors[key] = self._mirror(key, "running")
        self.mirrors[key].start()
        print_line(f"{self.trials[key].label}: started")

    def end_trial(self, key: str, error: str | None) -> None:
        """Note how a trial ended: its files say how, `error` only why."""
        trial, mirror = self.trials[key], self.mirrors.pop(key)
        state, reason = self._find_end(trial, error)
        self.ledger.record_state(key, state, reason)
        mirror.tags |= {tracking.STATE_TAG: state, **({"sweep.reason": reason} if reason else {})}
        mirror.stop(STATUS.get(state, "KILLED"))
        self.publish()
        row = next(row for row in self.leaderboard.rows if row.key == key)
        end = {
            "finished": f"finished in {format_duration(row.seconds)}: {format_headline(row.scores)}",
            "failed": f"failed: {reason}",
        }
        print_line(f"{trial.label}: {end.get(state, reason or state)}")

    def _find_end(self, trial: Trial, error: str | None) -> tuple[State, str]:
        """Return the state and the reason of a trial that runs no more."""
        if not list_unfinished_stages(trial.place, "report"):
            return "finished", ""
        record = self.ledger.records[trial.key]
        if record.state == "stopped":
            return "stopped", record.reason
        if error is None and self.interrupted():
            return "interrupted", ""
        reason = error or "it ended before its work was done"
        return "failed", textwrap.shorten(reason, LONGEST, placeholder=" ...")

    def _mirror(self, key: str, state: State) -> tracking.Mirror:
        trial = self.trials[key]
        # as the experiment has them: 0 is 0.0 where a number is meant, as in every other trial
        values = config.flatten(config.to_dict(trial.place.experiment))
        swept = {name: str(values.get(name, value)) for name, value in trial.swept.items()}
        identity = {tracking.TRIAL_TAG: key, "sweep": self.sweep.name}
        child = tracking.ChildRun(trial.label, identity, swept, self.folder / "tracking" / f"{key}.json")
        tags = {**identity, **swept, tracking.STATE_TAG: state}
        if self.parent.run_id:
            tags[tracking.PARENT_TAG] = self.parent.run_id
        return tracking.Mirror(self.uri, self.sweep.name, trial.place, tags, print_line, child)

    def publish(self) -> None:
        """Write the leaderboard as it is now, into the study's folder and to the server."""
        self.leaderboard = board = leaderboard.rank_trials(self.sweep, self.trials, self.ledger)
        leaderboard.write(board, self.folder)
        tags: dict[str, str] = {}
        scores: dict[str, float] = {}
        if best := board.winner:
            metric = self.sweep.rank.metric
            tags = {"best_trial": best.label, "best_run": best.place.name}
            tags |= {f"best.{key}": str(value) for key, value in best.swept.items()}
            scores = {f"best/{metric}": best.scores[metric]}
        rungs = {key: self.ledger.records[key].rungs for key in self.trials}
        table, note = leaderboard.list_cells(board), leaderboard.format_markdown(board)
        self.parent.send_leaderboard(table, note, tags, scores, rungs)

    def close(self, status: str) -> None:
        """Write leaderboard and report, and say the last word to the server, however the study ended."""
        from pipeline.report import comparison

        self.publish()
        rows = [row for row in self.leaderboard.rows if row.scores]
        sweep, report = self.sweep, self.folder / "report"
        if rows:
            comparison.write_comparison(rows, report, sweep.name, sweep.metric, sweep.note)
        self.parent.finish(status, report)

    def count_done(self) -> int:
        return sum(self.ledger.is_done(key) for key in self.trials)

    def describe_progress(self) -> str:
        """Say of each trial that runs which stage it is in, told from its files; of training the step."""
        notes = []
        for key in list(self.mirrors):
            trial = self.trials[key]
            step, steps = read_progress(trial.place)[0], trial.place.experiment.train.steps
            ended = trial.place.read_stage_seconds()
            stage = next((stage for stage in AFTER_TRAINING if stage not in ended), "ends")
            notes.append(f"{trial.label} {f'{step}/{steps}' if step < steps or not ended else stage}")
        return "; ".join(notes)
