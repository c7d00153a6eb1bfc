"""The order of the stages, what is up to date, who runs what where, what is mirrored."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import config
from pipeline.compute.interrupt import Interrupt, Interrupted
from pipeline.compute.work import GIB, Done, Executor, InProcess, Unit, local_context
from pipeline.config import ClusterConfig, Experiment
from pipeline.console import bar, duration, following, say
from pipeline.data import sources
from pipeline.engine import preflight
from pipeline.engine.provenance import commit, made_with
from pipeline.errors import ConfigError, PipelineError
from pipeline.stages import select
from pipeline.store import keys, selection
from pipeline.store.files import exclusive, remove_leftovers, write_json, write_text
from pipeline.store.log import read_progress
from pipeline.store.run import STAGES, Place, fingerprints_json

if TYPE_CHECKING:
    from pipeline.compute.session import Session

BEFORE: dict[str, tuple[str, ...]] = {
    "shard": (),
    "train": ("shard",),
    "sample": ("shard", "train", "select"),
    "evaluate": ("shard", "train", "select", "sample"),
    "figures": ("shard", "train", "select", "sample"),
}


def _module(stage: str) -> Any:
    return import_module(f"pipeline.stages.{stage}")


def storage_root(cluster: ClusterConfig) -> Path:
    """The absolute storage root, made if need be. Raises PipelineError where it cannot be written."""
    root = Path(cluster.storage).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PipelineError(
            f"the storage root {root} cannot be written ({error.strerror}); set cluster.storage"
        ) from error
    return root


def _check_files(experiment: Experiment) -> None:
    if missing := experiment.missing():
        raise ConfigError(missing)


def locate(experiment: Experiment, root: Path) -> Place:
    """The run that `experiment` means. Reads the data source's fingerprint; raises ConfigError where a file that
    the experiment names is missing."""
    _check_files(experiment)
    fingerprint = sources.fingerprint(experiment.data, fingerprints_json(root))
    data_key = keys.data_key(experiment, fingerprint)
    return Place(root, experiment, data_key, keys.run_key(experiment, data_key))


def pending(experiment: Experiment, run: Place, last: str) -> list[str]:
    """The stages that `last` needs, itself included, that still have work, in order.

    As long as a choice among checkpoints is to be made, so is everything after it: nobody knows yet of which.
    A report is of everything before it, so it is looked at again whenever something was to do.
    """
    todo: list[str] = []
    for stage in _wanted(experiment, last):
        waits = "select" in todo or (stage == "report" and todo)
        if waits or not all(_module(stage).is_done(e, run) for e in subjects(stage, experiment, run)):
            todo.append(stage)
    return todo


def _wanted(experiment: Experiment, last: str) -> list[str]:
    """`last` and the stages that it needs."""
    needless = set()
    if last == "train" and experiment.published.weights:
        needless.add("shard")  # nothing is trained, so no images are needed
    if last == "evaluate" and not _module("evaluate").needs_samples(experiment):
        needless.add("sample")
    chooses = experiment.sample.checkpoint == "best" or last in ("evaluate", "report")
    if not (experiment.evaluate.checkpoints and chooses):
        needless.add("select")
    return [s for s in (STAGES if last == "report" else (*BEFORE[last], last)) if s not in needless]


def subjects(stage: str, experiment: Experiment, run: Place) -> list[Experiment]:
    """What a stage works on: the experiment; after the choice, with the checkpoint that was chosen."""
    if stage in ("shard", "train", "select"):
        return [experiment]
    found = selection.resolved(experiment, run)
    assert found is not None, "the choice comes first"
    return [found]


def check(experiment: Experiment, cluster: ClusterConfig) -> None:
    """Raise PipelineError where experiment and cluster, each valid, do not go together."""
    _module("train").check_workers(experiment.train, cluster.workers or 1)


def execute(experiment: Experiment, cluster: ClusterConfig, last: str) -> Place:
    """Bring the run up to date, `last` included. Raises Interrupted, PipelineError."""
    root = storage_root(cluster)
    run = locate(experiment, root)
    with exclusive(run.path):
        remove_leftovers(run.path)
        todo = pending(experiment, run, last)
        _say_plan(run, todo, last)
        if todo:
            check(experiment, cluster)
            say(f"needs {preflight.check(experiment, run)}")
            _write_experiment(experiment, run)
            with _Work(experiment, cluster, run) as work:
                work.do_all(todo, last)
    return run


def execute_within(
    executor: Executor,
    interrupted: Callable[[], bool],
    experiment: Experiment,
    cluster: ClusterConfig,
    run: Place,
    last: str,
    asked: Experiment | None = None,
) -> None:
    """`execute` for a caller that has an executor, notices interruptions and mirrors by itself: a sweep.

    Waits for another command that works on the run. `asked` is what experiment.yaml says, where that is more
    than this call does. Raises Interrupted, PipelineError.
    """
    with exclusive(run.path, wait=True):
        remove_leftovers(run.path)
        for left_behind in (run.stop_file, run.heartbeat):
            left_behind.unlink(missing_ok=True)
        todo = pending(experiment, run, last)
        if todo:
            preflight.check(experiment, run)
            _write_experiment(asked or experiment, run)
            work = _Work(experiment, cluster, run)
            work.executor, work.interrupted = executor, interrupted
            work.do_all(todo, last)


def _say_plan(run: Place, todo: list[str], last: str) -> None:
    if not todo:
        say(f"{run.path.name}: everything up to date, '{last}' included")
    else:
        say(f"{run.path.name}: {', '.join(todo)}")


def start_executor(cluster: ClusterConfig, interrupt: Interrupt, stack: ExitStack) -> Session | InProcess:
    """Who does the work, where the cluster says so; `stack` ends it."""
    if cluster.workers == 0:
        context = local_context(cluster.cpus_per_worker, int(cluster.image_memory * GIB))
        return InProcess(context, interrupt.requested)
    from pipeline.compute.session import Session

    address = cluster.ray_address
    say("starting Ray" if address is None else f"joining Ray at {address}")
    session = stack.enter_context(Session(cluster, interrupt.requested))
    interrupt.install()  # ray.init replaces the handler of SIGTERM
    return session


class _Work:
    """One command's work: the executor and the mirror, started when first needed, and the way out."""

    def __init__(self, experiment: Experiment, cluster: ClusterConfig, run: Place):
        self.experiment, self.cluster, self.run = experiment, cluster, run
        self.interrupt = Interrupt(run.stop_file)
        self.interrupted = self.interrupt.requested
        self.executor: Executor | None = None
        self.stack = ExitStack()

    def __enter__(self) -> _Work:
        from pipeline import tracking

        uri = self.cluster.tracking_uri
        if uri:
            tracking.check(uri)
        for left_behind in (self.run.stop_file, self.run.heartbeat):
            left_behind.unlink(missing_ok=True)
        try:
            self.stack.enter_context(
                tracking.Mirror(
                    uri or tracking.default_uri(self.run.storage),
                    self.experiment.name,
                    self.experiment,
                    self.run,
                )
            )
            self.stack.enter_context(self.interrupt)
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def _start_executor(self) -> Executor:
        if self.executor is None:
            self.executor = start_executor(self.cluster, self.interrupt, self.stack)
        return self.executor

    def do_all(self, todo: list[str], last: str) -> None:
        while todo:
            stage = todo.pop(0)
            self.do(stage, scored="evaluate" in todo)
            if stage == "shard" and "evaluate" in todo:
                _module("evaluate").check(self.experiment, self.run)  # before hours of training
            if stage == "select":
                todo = pending(self.experiment, self.run, last)  # of what was chosen

    def do(self, stage: str, scored: bool = False) -> None:
        """Run one stage to its end and note how long it took; its samples are `scored` by this command too."""
        began = time.monotonic()
        _note_commit(self.run, stage)
        if stage == "train":
            self._train()
        else:
            self._units(stage, scored)
        seconds = time.monotonic() - began
        _note_timing(self.run, stage, seconds)
        say(f"{stage}: done in {duration(seconds)}")

    def _train(self) -> None:
        from pipeline.stages import train
        from pipeline.store import checkpoint, diffusers_layout

        if self.experiment.published.weights:
            diffusers_layout.import_weights(self.run)
            return
        steps = self.experiment.train.steps
        start = max([step for step in checkpoint.steps_on_disk(self.run.train) if step <= steps], default=0)
        executor = self._start_executor()
        with (
            bar("train", steps, "steps", start) as shown,
            following(lambda: _show_progress(shown, self.run, start, steps)),
            select.during_training(self.experiment, self.run, executor),
        ):
            executor.run_workers(train.body, self.experiment, self.run)
        self._leave_if_interrupted()

    def _units(self, stage: str, scored: bool) -> None:
        # Runs share their data; units are idempotent, so waiting for each other only saves work.
        lock = exclusive(self.run.data, wait=True) if stage == "shard" else nullcontext()
        after = (
            _module("evaluate").follow_samples(self.experiment, self.run)
            if scored and stage == "sample"
            else None
        )
        with lock:
            module, run = _module(stage), self.run
            asked = [e for e in subjects(stage, self.experiment, run) if not module.is_done(e, run)]
            for units in select.together(module.work(e, run) for e in asked):
                if units:
                    self._map(stage, units, after)

    def _map(self, stage: str, units: list[Unit], after: Done | None) -> None:
        """Run the units, and what `after` says can be done once one of them is: features while others sample."""
        # An image's bound takes a thousand times as long as its features: told as one, no time left would be true.
        mixed, done = len({unit.passes for unit in units}) > 1, 0
        share = {id(unit): unit.images * (unit.passes if mixed else 1) for unit in units}
        executor = self._start_executor()
        chain = self.experiment.sample.steps or self.experiment.diffusion.timesteps
        with bar(stage, sum(share.values()), "network passes" if mixed else "images") as shown:

            def finished(unit: Unit) -> Sequence[Unit] | None:
                nonlocal done
                done += share.get(id(unit), 0)
                shown.update(done)
                return after(unit) if after else None

            try:
                executor.map_units(units, finished)
            finally:
                executor.spent.write(self.run.spent_json, chain)
        self._leave_if_interrupted()

    def _leave_if_interrupted(self) -> None:
        if self.interrupted():
            raise Interrupted


def _show_progress(shown: Any, run: Place, start: int, steps: int) -> None:
    step, loss = read_progress(run)
    if start < step <= steps:
        shown.update(step, "" if loss is None else f"loss {loss:.4f}")


def _write_experiment(experiment: Experiment, run: Place) -> None:
    """The resolved configuration, with what it was made with: the record that a run directory opens with."""
    write_text(
        run.experiment_yaml, config.to_yaml(experiment, made_with={**made_with(), "data_key": run.data_key})
    )


def _note_commit(run: Place, stage: str) -> None:
    """The code that begins on a stage; training may go on with other code than it began with."""
    commits, here = run.commits_by_stage(), commit()
    if here is not None and here not in commits.setdefault(stage, []):
        commits[stage].append(here)
        write_json(run.commits_json, commits)


def _note_timing(run: Place, stage: str, seconds: float) -> None:
    """Seconds that each stage took, summed over the commands that worked on it."""
    timings = run.seconds_by_stage()
    write_json(run.timings_json, {**timings, stage: timings.get(stage, 0.0) + seconds})


def whereabouts(run: Place, cluster: ClusterConfig) -> list[tuple[str, str]]:
    """What a command ends by naming."""
    from pipeline import tracking

    found = [("run", str(run.path)), ("MLflow", tracking.describe(run, cluster.tracking_uri))]
    if (run.report / "report.html").exists():
        found.append(("report", str(run.report / "report.html")))
    return found


def sync(name: str, cluster: ClusterConfig) -> str:
    """Deliver a run directory to the tracking server; returns what was done, in a line."""
    from pipeline import tracking

    experiment, run = opened(run_directory(name, Path(cluster.storage).expanduser().absolute()))
    uri = cluster.tracking_uri or tracking.default_uri(run.storage)
    tracking.check(uri)
    with exclusive(run.path):
        return tracking.sync(uri, experiment.name, experiment, run)


def opened(path: Path) -> tuple[Experiment, Place]:
    """What a run directory is of, as the last command on it had it."""
    try:
        experiment = config.load_experiment(str(path / "experiment.yaml"), [])
    except PipelineError as error:
        raise PipelineError(f"{path / 'experiment.yaml'} cannot be read: {error}") from error
    _check_files(experiment)
    data_key = config.made_with(path / "experiment.yaml")["data_key"]  # the data itself may be elsewhere
    key = keys.run_key(experiment, data_key)
    return experiment, Place(path.parent, experiment, data_key, key)


def run_directories(name: str, root: Path) -> list[Path]:
    """Every run that `name` means: a path, a name in the storage root, or how several names there begin."""
    if not (root / name / "experiment.yaml").is_file():
        beginning = sorted(path.parent for path in root.glob(f"{glob.escape(name)}*/experiment.yaml"))
        if beginning:
            return beginning
    return [run_directory(name, root)]


def run_directory(name: str, root: Path) -> Path:
    """The absolute path of the run that `name` (a path, or a name in the storage root) means."""
    path = next((p for p in (Path(name).absolute(), root / name) if (p / "experiment.yaml").is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.parent.name for p in root.glob("*/experiment.yaml"))) or "none"
        raise PipelineError(f"'{name}' is no run directory; runs in {root}: {known}")
    return path
