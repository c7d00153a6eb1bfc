"""The driver of a study: what is to do, who does it, and the same again after an interruption."""

from __future__ import annotations

import math
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import tracking
from pipeline.compute.interrupt import StopRequest, StopSignals
from pipeline.compute.units import Executor, LocalExecutor
from pipeline.config import ClusterConfig
from pipeline.console import format_duration, poll_during, print_line, show_progress
from pipeline.engine import execute as stages
from pipeline.engine import find
from pipeline.errors import PipelineError
from pipeline.scores.metrics import LOSS
from pipeline.scores.preparations import list_preparations
from pipeline.stages import evaluate
from pipeline.store.files import lock_folder
from pipeline.store.run import REPORT_HTML, STOP, locate_study
from pipeline.sweep.definition import Sweep
from pipeline.sweep.leaderboard import Leaderboard, rank_trials
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.points import SweepPoint, locate_trials
from pipeline.sweep.recorder import Recorder
from pipeline.sweep.resources import Nodes, Share, list_local_nodes, share_cluster
from pipeline.sweep.work import Task, explain_error, run_trial

if TYPE_CHECKING:
    from pipeline.sweep.tuning import RungScheduler


class Study:
    """A sweep over a storage root. The driver alone writes the study's folder and talks to MLflow; trials write run
    directories."""

    def __init__(self, sweep: Sweep, points: list[SweepPoint], cluster: ClusterConfig):
        self.sweep, self.cluster = sweep, cluster
        self.root = find.prepare_storage_root(cluster)
        self.folder = locate_study(self.root, sweep.name)
        self.trials = {trial.key: trial for trial in locate_trials(points, self.root)}
        self.ledger = Ledger(self.folder, sweep.early_stop, self.trials.values())
        self.interrupt = StopSignals(self.folder / STOP)

    def _list_pending(self) -> list[str]:
        """Return the keys of the trials that are to do."""
        return [key for key in self.trials if not self.ledger.is_done(key)]

    def describe_plan(self) -> str:
        """List trials, resources and the time left; start nothing and write nothing."""
        todo = len(self._list_pending())
        slots, resources = 1, "this process, one trial after the other"
        if self.cluster.workers != 0 and self.cluster.ray_address is None:
            share = self._share(list_local_nodes())
            slots, resources = share.slots, str(share)
        elif self.cluster.workers != 0:  # a cluster that runs elsewhere is not asked
            slots = self.sweep.concurrent or 1
            resources = f"as many trials at a time as {self.cluster.ray_address} has room for"
        board = rank_trials(self.sweep, self.trials, self.ledger)
        took = [row.seconds for row in board.rows if row.state == "finished" and row.seconds]
        left = "unknown until a trial has finished"
        if took:
            seconds = math.ceil(todo / slots) * sum(took) / len(took)
            left = f"about {format_duration(seconds)}, from what finished trials took"
        lines = [f"{self.sweep.name}: {len(self.trials)} trials, {todo} to do"]
        lines += [self.sweep.note] if self.sweep.note else []
        lines += [
            f"  {self.ledger.records[key].state:<12} {trial.label}" for key, trial in self.trials.items()
        ]
        return "\n".join([*lines, f"resources: {resources}", f"time left: {left}"])

    def _share(self, nodes: Nodes) -> Share:
        return share_cluster(self.cluster, nodes, max(1, len(self._list_pending())), self.sweep.concurrent)

    def run(self) -> Leaderboard:
        """Bring every trial up to date and rank them. A trial that fails raises nothing. Raises StopRequest,
        PipelineError."""
        uri = self.cluster.tracking_uri or tracking.find_default_uri(self.root)
        if self.cluster.tracking_uri:
            tracking.check_server(uri)
        with lock_folder(self.folder):
            self.interrupt.stop_file.unlink(missing_ok=True)
            self.ledger = Ledger(self.folder, self.sweep.early_stop, self.trials.values())
            self.recorder = Recorder(
                self.sweep, self.trials, self.ledger, self.folder, uri, self.interrupt.is_requested
            )
            todo, total = self._list_pending(), len(self.trials)
            print_line(f"{self.sweep.name}: {total} trials, {total - len(todo)} done, {len(todo)} to do")
            if self.sweep.note:
                print_line(self.sweep.note)
            self.recorder.open()
            status = "KILLED"
            try:
                if todo:
                    self._run_trials(todo)
                status = "FINISHED"
            except PipelineError:
                status = "FAILED"
                raise
            finally:
                self.recorder.close(status)
                shutil.rmtree(self.folder / "ray", ignore_errors=True)
        return self.recorder.leaderboard

    def _run_trials(self, todo: list[str]) -> None:
        recorder = self.recorder
        with self.interrupt, ExitStack() as stack:
            executor = stages.start_executor(self.cluster, self.interrupt, stack)
            try:
                stop_file, stop = self.interrupt.stop_file, self.sweep.early_stop
                places = {key: self.trials[key].place for key in self._prepare(executor, todo)}
                tasks = {key: Task(place, self.cluster, stop_file, stop) for key, place in places.items()}
                judge = self._find_judge()
                with (
                    show_progress(
                        self.sweep.name, len(self.trials), "trials", recorder.count_done()
                    ) as shown,
                    poll_during(lambda: shown.update(recorder.count_done(), recorder.describe_progress())),
                ):
                    if isinstance(executor, LocalExecutor):
                        self._run_in_process(tasks, executor, judge)
                    elif tasks:
                        from pipeline.sweep.tuning import run_tasks

                        executor.pool.end()  # what was prepared for all; each trial has a pool of its own
                        share = self._share(executor.list_nodes())
                        print_line(f"{self.sweep.name}: {share}")
                        run_tasks(tasks, share, recorder, judge, self.folder / "ray")
            finally:
                for key in list(recorder.mirrors):  # this driver is on its way out, and they with it
                    recorder.end_trial(key, None)
            if self.interrupt.is_requested():
                raise StopRequest

    def _prepare(self, executor: Executor, todo: list[str]) -> list[str]:
        """Make what trials share before they would all make it; return those that can go on from there."""
        sharded: set[Path] = set()
        able = []
        for key in todo:
            place = self.trials[key].place
            try:
                if place.data not in sharded:
                    stages.run_trial_stages(
                        executor, self.interrupt.is_requested, self.cluster, place, "shard"
                    )
                evaluate.STAGE.check_before_training(place)
                sharded.add(place.data)
                if evaluate.needs_samples(place.experiment) and (units := list_preparations(place)):
                    names = " and ".join(unit.name for unit in units)
                    print_line(f"{self.sweep.name}: making {names}, which all trials share")
                    executor.map_units(units, lambda unit: None)
                able.append(key)
            except PipelineError as error:
                self.recorder.start_trial(key)
                self.recorder.end_trial(key, explain_error(error))
            if self.interrupt.is_requested():
                raise StopRequest
        return able

    def _find_judge(self) -> RungScheduler | None:
        """Return who stops trials early; None where nobody does."""
        if not self.sweep.early_stop.first:
            return None
        from pipeline.sweep.tuning import RungScheduler

        return RungScheduler(self.sweep.early_stop, self.trials, self.ledger)

    def _run_in_process(
        self, tasks: dict[str, Task], executor: LocalExecutor, judge: RungScheduler | None
    ) -> None:
        """Do without Ray the same work, with the same judge."""
        for key, task in tasks.items():
            if self.recorder.should_stop():
                return
            self.recorder.start_trial(key)
            should_continue = partial(judge.judge, key) if judge else lambda step, bound: True
            self.recorder.end_trial(key, run_trial(task, executor, should_continue))

    # What the command ends with

    def describe_unfinished(self) -> str:
        """Say what the budget did not allow; nothing where it sufficed."""
        states = [self.ledger.records[key].state for key in self.trials]
        left, hours = states.count("new") + states.count("interrupted"), self.sweep.budget.hours
        if not left or hours is None:
            return ""
        return f"budget.hours={hours:g} is spent, {left} trials are left; the same command goes on"

    def list_links(self) -> list[tuple[str, str]]:
        """Return (what, where) of everything that a person may want to look at."""
        by, report = self.sweep.metric, self.folder / "report" / REPORT_HTML
        metric = "train/loss" if by.name == LOSS.name else f"eval/{by.name}"
        links = self.recorder.parent.list_links(metric, by.larger_is_better)
        places = [("leaderboard", str(self.folder / "leaderboard.md")), *links]
        return [*places, ("report", str(report))] if report.exists() else places
