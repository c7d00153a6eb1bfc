"""Records starts and ends of trials: state file, MLflow, leaderboard, console."""

import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline import config, tracking
from pipeline.console import format_duration, print_line
from pipeline.engine.plan import list_unfinished_stages
from pipeline.scores.metrics import LOSS, format_headline
from pipeline.store.files import write_text
from pipeline.store.log import read_progress
from pipeline.sweep import leaderboard
from pipeline.sweep.definition import Sweep
from pipeline.sweep.points import State, Trial, TrialStates
from pipeline.sweep.trial import PartResult

AFTER_TRAINING = ("sample", "evaluate", "figures", "report")
DEADLINE = 120.0  # seconds after the last trial to send what the server lacks
LONGEST = 300  # characters of a reason; those of libraries can be long
STATUS = {"finished": "FINISHED", "failed": "FAILED"}  # on the server; anything else was KILLED


@dataclass
class StudyRecorder:
    """Records the progress of a study in its folder and in MLflow at `uri`."""

    sweep: Sweep
    trials: dict[str, Trial]
    states: TrialStates
    folder: Path
    uri: str
    is_interrupted: Callable[[], bool]
    largest_model: float = 0  # bytes

    def __post_init__(self) -> None:
        storage = self.folder.parent.parent
        by, where = self.sweep.metric, (self.uri, self.sweep.name, storage)
        metric = "loss/train" if by.name == LOSS.name else by.name
        self.parent = tracking.ParentRun(*where, print_line, metric, by.larger_is_better)
        self.mirrors: dict[str, tracking.Mirror] = {}  # of the trials that run
        self.began = time.monotonic()
        # A server that does not answer delays only this thread.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="study-tracking")
        self.deliveries: list[Future[None]] = []

    def start(self) -> None:
        """Start the study's MLflow run, and send what earlier commands could not."""
        write_text(self.folder / "sweep.yaml", config.to_yaml(self.sweep))
        self.parent.start(self.folder / "sweep.yaml", self.trials)
        for key in self.trials:
            state = self.states.records[key]["state"]
            if state == "new":
                continue
            # The server may not have all of it: its driver was killed, or it was made elsewhere.
            mirror = self._make_mirror(key, state)
            self._deliver(partial(self._end_mirror, mirror, mirror.send_missing, state))

    def may_start_trial(self) -> bool:
        hours = self.sweep.budget.hours
        return not self.is_interrupted() and (hours is None or time.monotonic() - self.began <= 3600 * hours)

    def start_trial(self, key: str) -> None:
        self.states.set_state(key, "running")
        self.mirrors[key] = self._make_mirror(key, "running")
        self.mirrors[key].start()
        print_line(f"{self.trials[key].label}: started")

    def end_part(self, key: str, steps: int | None, result: PartResult) -> bool:
        """Record the end of a part of a trial; return whether its next part is to be run."""
        goes_on = result.bound is not None and self.states.should_continue(key, steps or 0, result.bound)
        if not goes_on:
            self.end_trial(key, result.error)
        return goes_on

    def end_trial(self, key: str, error: str | None) -> None:
        """Record the end of a trial. Its files decide the state; `error` is the reason of a failure."""
        trial, mirror, record = self.trials[key], self.mirrors.pop(key), self.states.records[key]
        state: State = "failed"
        reason = error or "it ended before its work was done"
        if not list_unfinished_stages(trial.place, "report"):
            state, reason = "finished", ""
        elif record["state"] == "stopped":
            state, reason = "stopped", record["reason"]
        elif error is None and self.is_interrupted():
            state, reason = "interrupted", ""
        else:
            reason = textwrap.shorten(reason, LONGEST, placeholder=" ...")
        self.states.set_state(key, state, reason)
        mirror.tags |= {tracking.STATE_TAG: state, **({"sweep.reason": reason} if reason else {})}
        self._deliver(partial(self._end_mirror, mirror, mirror.stop, state))
        self.update_leaderboard()
        end = f"failed: {reason}" if state == "failed" else reason or state
        if state == "finished":
            row = next(row for row in self.leaderboard.rows if row.key == key)
            end = f"finished in {format_duration(row.seconds)}: {format_headline(row.scores)}"
        print_line(f"{trial.label}: {end}")

    def _deliver(self, send: Callable[[], None]) -> None:
        """Call `send` on the thread of the server, after all earlier deliveries."""
        self.deliveries.append(self.thread.submit(send))

    def _end_mirror(self, mirror: tracking.Mirror, end: Callable[[str], None], state: State) -> None:
        end(STATUS.get(state, "KILLED"))
        self.parent.is_behind |= mirror.is_behind

    def _make_mirror(self, key: str, state: State) -> tracking.Mirror:
        trial = self.trials[key]
        # Written as the experiment has them, so that 0 is 0.0 in every trial.
        values = config.flatten(config.to_dict(trial.place.experiment))
        swept = {name: str(values.get(name, value)) for name, value in trial.swept.items()}
        identity = {tracking.TRIAL_TAG: key, "sweep": self.sweep.name}
        child = tracking.ChildRun(trial.label, identity, swept, self.folder / "tracking" / f"{key}.json")
        tags = {**identity, **swept, tracking.STATE_TAG: state}
        if self.parent.run_id:
            tags[tracking.PARENT_TAG] = self.parent.run_id
        run = (self.uri, self.sweep.name, trial.place)
        return tracking.Mirror(*run, tags, print_line, child, self.largest_model)

    def update_leaderboard(self) -> None:
        self.leaderboard = board = leaderboard.rank_trials(self.sweep, self.trials, self.states)
        leaderboard.write_leaderboard(board, self.folder)
        tags: dict[str, str] = {}
        scores: dict[str, float] = {}
        if best := board.best_trial:
            rank, metric = board.points[0].rank, self.sweep.rank.metric
            tags = {"best_trial": best.label, "best_run": best.place.name, "best_rank": rank}
            tags |= {f"best.{key}": str(value) for key, value in best.swept.items()}
            known = {name: best.scores.get(name) for name in (metric, f"{metric}_se")}
            scores = {f"best/{name}": value for name, value in known.items() if value is not None}
        rungs = {key: self.states.records[key]["rungs"] for key in self.trials}
        table, note = leaderboard.make_rows(board), leaderboard.format_markdown(board)
        self._deliver(partial(self.parent.send_leaderboard, table, note, tags, scores, rungs))

    def finish(self, status: str) -> None:
        """Write leaderboard and report; set the final status in MLflow."""
        from pipeline.report import comparison

        self.update_leaderboard()
        sweep, report = self.sweep, self.folder / "report"
        if rows := [row for row in self.leaderboard.rows if row.scores]:
            comparison.write_comparison(rows, report, sweep.name, sweep.metric, sweep.note)
        self._deliver(partial(self.parent.finish, status, report))
        self.parent.is_behind |= bool(wait(self.deliveries, DEADLINE).not_done)
        self.thread.shutdown(wait=False, cancel_futures=True)

    def describe_progress(self) -> str:
        """Return the stage of each running trial, and the step of training, as one line."""
        notes = []
        for key in list(self.mirrors):
            trial = self.trials[key]
            step, steps = read_progress(trial.place)[0], trial.place.experiment.train.steps
            ended = trial.place.read_stage_seconds()
            stage = next((stage for stage in AFTER_TRAINING if stage not in ended), "ends")
            notes.append(f"{trial.label} {f'{step}/{steps}' if step < steps or not ended else stage}")
        return "; ".join(notes)
