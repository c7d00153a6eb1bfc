"""Execution of the unfinished stages of a run: the executor, the records, the mirror in MLflow."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from pipeline import config
from pipeline.compute.interrupt import StopRequest, StopSignals
from pipeline.compute.units import GIB, Executor, LocalExecutor, Unit, create_local_worker
from pipeline.config import ClusterConfig, Experiment
from pipeline.console import format_duration, poll_in_thread, print_line, show_progress
from pipeline.engine import preflight
from pipeline.engine.code import find_commit
from pipeline.engine.find import explain_unreadable_runs, make_place, prepare_storage_root
from pipeline.engine.plan import find_stage_place, list_rounds, list_unfinished_stages
from pipeline.engine.provenance import describe_other_code, write_record
from pipeline.errors import hide_password
from pipeline.stages.stage import Stage, WorkerStage
from pipeline.store.files import lock_folder, remove_leftovers
from pipeline.store.log import read_progress
from pipeline.store.run import Place

if TYPE_CHECKING:
    from pipeline.compute.session import RaySession


def run_stages(experiment: Experiment, cluster: ClusterConfig, last: str, accept_code: bool = False) -> Place:
    """Run `last`, and the stages that it needs, unless they are done. Raises StopRequest, PipelineError.

    accept_code: whether to continue a run of other code.
    """
    place = make_place(experiment, prepare_storage_root(cluster))
    is_new = not place.path.exists()
    for line in explain_unreadable_runs(place) if is_new else []:
        print_line(line)
    with lock_folder(place.path), _remove_unused_folder(place, is_new):
        _remove_leftovers(place)
        from pipeline import tracking

        uri = tracking.find_uri(cluster)
        mirror = tracking.Mirror(uri, experiment.name, place, largest_model=cluster.largest_model)
        todo = list_unfinished_stages(place, last)
        if not todo:
            print_line(f"{place.name}: everything up to date, '{last}' included")
            if note := describe_other_code(place):
                print_line(note)
            mirror.send_missing("FINISHED" if last == "report" else "")
            return place
        print_line(f"{place.name}: {', '.join(stage.name for stage in todo)}")
        config.require_images_for_workers(experiment.train, cluster.workers or 1)
        preflight.check_workers(cluster)
        print_line(f"needs {preflight.check_resources(place, todo)}")
        for warning in experiment.list_warnings():
            print_line(f"warning: {warning}")
        write_record(place, todo, accept_code)
        if cluster.tracking_uri:
            tracking.check_server(uri)
        interrupt = StopSignals(place.stop_file)
        pixels = experiment.train.batch_size * experiment.data.image_size**2
        with mirror, interrupt, ExitStack() as stack:
            start = cache(
                partial(start_executor, cluster, interrupt, stack, pixels)
            )  # when it is first needed
            _RunExecution(place, start, interrupt.is_requested).run_all(todo, last)
    return place


@contextmanager
def _remove_unused_folder(place: Place, is_new: bool) -> Iterator[None]:
    try:
        yield
    except Exception:
        if is_new and not place.has_training:
            shutil.rmtree(place.path)
        raise


def run_trial_stages(
    executor: Executor, place: Place, last: str, asked: Experiment | None = None, accept_code: bool = False
) -> None:
    """Run the unfinished stages of a trial with its study's executor; wait for other commands that work on the run.

    asked: the experiment for experiment.yaml, if this call does a part of it only. Raises StopRequest, PipelineError.
    """
    with lock_folder(place.path, wait=True):
        _remove_leftovers(place)
        if todo := list_unfinished_stages(place, last):
            preflight.check_resources(place, todo)
            write_record(place.replace_experiment(asked) if asked else place, todo, accept_code)
            _RunExecution(place, lambda: executor, executor.is_interrupted).run_all(todo, last)


def start_executor(
    cluster: ClusterConfig, interrupt: StopSignals, stack: ExitStack, pixels: int | None = None
) -> RaySession | LocalExecutor:
    """Return the executor: a Ray session, or this process if cluster.workers=0; `stack` ends it.

    pixels: of a training batch, if there is a training.
    """
    if cluster.workers == 0:
        context = create_local_worker(cluster.cpus_per_worker, int(cluster.image_memory * GIB))
        return LocalExecutor(context, interrupt.is_requested)
    address = cluster.ray_address
    if address is None:
        from pipeline.compute.local_ray import ENVIRONMENT

        os.environ.update(ENVIRONMENT)
    from pipeline.compute.session import RaySession

    print_line("starting Ray" if address is None else f"joining Ray at {hide_password(address)}")
    return stack.enter_context(RaySession(cluster, interrupt.is_requested, pixels))


@dataclass
class _RunExecution:
    """The work of one command on one run."""

    place: Place
    get_executor: Callable[[], Executor]
    is_interrupted: Callable[[], bool]

    def run_all(self, todo: list[Stage], last: str) -> None:
        """Run the stages in order; record the seconds and the commit of each; plan again after the selection."""
        while todo:
            stage = todo.pop(0)
            began = time.monotonic()
            self.place.add_commit(stage.name, find_commit())
            if isinstance(stage, WorkerStage) and stage.needs_workers(self.place):
                for later in todo:
                    later.check_before_training(self.place)
                self._run_workers(stage)
            else:
                self._run_units(stage)
            seconds = time.monotonic() - began
            self.place.add_seconds(stage.name, seconds)
            print_line(f"{stage.name}: done in {format_duration(seconds)}")
            if stage.selects_checkpoint:
                todo = list_unfinished_stages(self.place, last)

    def _run_workers(self, stage: WorkerStage) -> None:
        start, end = stage.find_step_range(self.place)
        executor = self.get_executor()
        with show_progress(stage.name, end, "steps", start) as progress:

            def show_step() -> None:
                step, loss = read_progress(self.place)
                if start < step <= end:
                    progress.update(step, "" if loss is None else f"loss {loss:.4f}")

            with poll_in_thread(show_step):
                executor.run_workers(stage.run_worker, self.place)
        if self.is_interrupted():
            raise StopRequest

    def _run_units(self, stage: Stage) -> None:
        place = find_stage_place(stage, self.place)
        shared = stage.find_shared_folder(place)
        # Runs share their data; units are idempotent, so waiting for each other only saves work.
        with lock_folder(shared, wait=True) if shared else nullcontext():
            if stage.is_done(place):  # another command did it meanwhile
                return
            for units in list_rounds(stage, place):
                if units:
                    self._run_round(stage, units)

    def _run_round(self, stage: Stage, units: list[Unit]) -> None:
        """Run the units, show their progress and record their cost."""
        # An image's bound takes a thousand times as long as its features: only passes can predict the time left.
        mixed, finished = len({unit.passes for unit in units}) > 1, 0
        share = {id(unit): unit.images * (unit.passes if mixed else 1) for unit in units}
        executor = self.get_executor()
        what = "network passes" if mixed else "images"
        with show_progress(stage.name, sum(share.values()), what) as progress:

            def finish(unit: Unit) -> None:
                nonlocal finished
                finished += share[id(unit)]
                progress.update(finished)

            try:
                executor.run_units(units, finish)
            finally:
                experiment = self.place.experiment
                chain = experiment.sample.steps or experiment.diffusion.timesteps
                self.place.add_costs(chain, executor.costs)
                executor.costs.clear()
        if self.is_interrupted():
            raise StopRequest


def _remove_leftovers(place: Place) -> None:
    remove_leftovers(place.path)
    for sign in (place.stop_file, place.heartbeat):
        sign.unlink(missing_ok=True)
