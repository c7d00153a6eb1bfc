"""The driver of a study."""

import math
from contextlib import ExitStack
from pathlib import Path

from pipeline import tracking
from pipeline.compute.interrupt import StopRequest, StopSignals
from pipeline.compute.resources import count_local_devices
from pipeline.compute.units import Executor, LocalExecutor
from pipeline.config import ClusterConfig
from pipeline.console import format_duration, poll_in_thread, print_line, show_progress
from pipeline.engine import execute as stages
from pipeline.engine import find
from pipeline.errors import PipelineError, hide_password
from pipeline.scores.preparations import list_preparations
from pipeline.stages import evaluate
from pipeline.store.files import lock_folder
from pipeline.store.run import REPORT_HTML, STOP, locate_study
from pipeline.sweep.definition import Sweep
from pipeline.sweep.leaderboard import Leaderboard, rank_trials
from pipeline.sweep.points import SweepPoint, TrialStates, make_trials
from pipeline.sweep.recorder import StudyRecorder
from pipeline.sweep.shares import divide_cluster
from pipeline.sweep.trial import TrialInputs, format_cause, run_part


class Study:
    """Runs the trials of a sweep; only this driver writes the study's folder and MLflow."""

    def __init__(self, sweep: Sweep, points: list[SweepPoint], cluster: ClusterConfig):
        self.sweep, self.cluster = sweep, cluster
        self.root = find.prepare_storage_root(cluster)
        self.folder = locate_study(self.root, sweep.name)
        self.trials = {trial.key: trial for trial in make_trials(points, self.root)}
        self.states = TrialStates(self.folder, sweep.early_stop, self.trials.values())
        self.interrupt = StopSignals(self.folder / STOP)

    def _list_unfinished_trials(self) -> list[str]:
        return [key for key in self.trials if not self.states.is_done(key)]

    def describe_plan(self) -> str:
        """Return trials, resources and time left as text; start nothing and write nothing."""
        sweep, cluster, todo = self.sweep, self.cluster, len(self._list_unfinished_trials())
        slots, resources = 1, "this process, one trial after the other"
        if cluster.workers != 0 and cluster.ray_address is None:
            share = divide_cluster(cluster, [count_local_devices()], todo, sweep.concurrent)
            slots, resources = share.slots, str(share)
        elif cluster.workers != 0:  # a cluster that runs elsewhere is not asked
            slots = sweep.concurrent or 1
            resources = f"as many trials at a time as {hide_password(cluster.ray_address or '')} has room for"
        board = rank_trials(sweep, self.trials, self.states)
        took = [row.seconds for row in board.rows if row.state == "finished" and row.seconds]
        left = "unknown until a trial has finished"
        if took:
            seconds = math.ceil(todo / slots) * sum(took) / len(took)
            left = f"about {format_duration(seconds)}, from what finished trials took"
        lines = [f"{sweep.name}: {len(self.trials)} trials, {todo} to do", *filter(None, [sweep.note])]
        records = self.states.records
        lines += [f"  {records[key]['state']:<12} {trial.label}" for key, trial in self.trials.items()]
        return "\n".join([*lines, f"resources: {resources}", f"time left: {left}"])

    def run(self, accept_code: bool = False) -> Leaderboard:
        """Run all unfinished trials and rank them; a failed trial does not stop the others.

        accept_code: whether to continue runs of other code. Raises StopRequest, PipelineError.
        """
        sweep, cluster = self.sweep, self.cluster
        uri = tracking.find_uri(cluster)
        if cluster.tracking_uri:
            tracking.check_server(uri)
        with lock_folder(self.folder):
            self.interrupt.stop_file.unlink(missing_ok=True)
            self.states = states = TrialStates(self.folder, sweep.early_stop, self.trials.values())
            asked, limit = self.interrupt.is_requested, cluster.largest_model
            self.recorder = StudyRecorder(sweep, self.trials, states, self.folder, uri, asked, limit)
            todo, total = self._list_unfinished_trials(), len(self.trials)
            print_line(f"{sweep.name}: {total} trials, {total - len(todo)} done, {len(todo)} to do")
            if sweep.note:
                print_line(sweep.note)
            self.recorder.start()
            status = "KILLED"
            try:
                if todo:
                    self._run_trials(todo, accept_code)
                status = "FINISHED"
            except PipelineError:
                status = "FAILED"
                raise
            finally:
                self.recorder.finish(status)
        return self.recorder.leaderboard

    def _run_trials(self, todo: list[str], accept_code: bool) -> None:
        recorder, name, stop = self.recorder, self.sweep.name, self.sweep.early_stop
        stop_file = self.interrupt.stop_file
        with self.interrupt, ExitStack() as stack:
            executor = stages.start_executor(self.cluster, self.interrupt, stack)
            try:
                tasks = {
                    key: TrialInputs(self.trials[key].place, self.cluster, stop_file, stop, accept_code)
                    for key in self._prepare_shared_data(executor, todo)
                }

                def count_done() -> int:
                    return len(self.trials) - len(self._list_unfinished_trials())

                with (
                    show_progress(name, len(self.trials), "trials", count_done()) as bar,
                    poll_in_thread(lambda: bar.update(count_done(), recorder.describe_progress())),
                ):
                    if isinstance(executor, LocalExecutor):
                        self._run_locally(tasks, executor)
                    elif tasks:
                        from pipeline.sweep.trial_tasks import run_trials

                        executor.pool.end_idle_actors()  # what was prepared for all; each trial has a pool of its own
                        pending, concurrent = len(self._list_unfinished_trials()), self.sweep.concurrent
                        share = divide_cluster(self.cluster, executor.list_nodes(), pending, concurrent)
                        print_line(f"{name}: {share}")
                        run_trials(tasks, share, recorder, executor.must_stop)
            finally:
                for key in list(recorder.mirrors):  # this driver ends, and the trials with it
                    recorder.end_trial(key, None)
            if self.interrupt.is_requested():
                raise StopRequest

    def _prepare_shared_data(self, executor: Executor, todo: list[str]) -> list[str]:
        """Make the shards and statistics that trials share; return the trials without errors."""
        sharded: set[Path] = set()
        able = []
        for key in todo:
            place = self.trials[key].place
            try:
                if place.data not in sharded:
                    stages.run_trial_stages(executor, place, "shard")
                evaluate.STAGE.check_before_training(place)
                sharded.add(place.data)
                if units := list_preparations(place):
                    names = " and ".join(unit.name for unit in units)
                    print_line(f"{self.sweep.name}: making {names}, which all trials share")
                    executor.run_units(units, lambda unit: None)
                able.append(key)
            except PipelineError as error:
                self.recorder.start_trial(key)
                self.recorder.end_trial(key, format_cause(error))
            if self.interrupt.is_requested():
                raise StopRequest
        return able

    def _run_locally(self, tasks: dict[str, TrialInputs], executor: LocalExecutor) -> None:
        for key, task in tasks.items():
            if not self.recorder.may_start_trial():
                return
            self.recorder.start_trial(key)
            for steps in task.parts:
                if not self.recorder.end_part(key, steps, run_part(task, executor, steps)):
                    break

    def describe_unstarted_trials(self) -> str:
        """Return a line on the trials for which the budget was too small; '' if there are none."""
        states = [self.states.records[key]["state"] for key in self.trials]
        left, hours = states.count("new") + states.count("interrupted"), self.sweep.budget.hours
        if not left or hours is None:
            return ""
        return f"budget.hours={hours:g} is spent, {left} trials are left; the same command continues"

    def list_links(self) -> list[tuple[str, str]]:
        report = self.folder / "report" / REPORT_HTML
        found = [("leaderboard", str(self.folder / "leaderboard.md")), *self.recorder.parent.list_links()]
        return [*found, ("report", report.as_uri())] if report.exists() else found
