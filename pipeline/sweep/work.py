"""What the process of one trial does: the stages of its run, by way of the rungs where trials are stopped early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.compute.interrupt import StopRequest
from pipeline.compute.units import Executor
from pipeline.config import ClusterConfig, Experiment
from pipeline.console import poll_during
from pipeline.engine import execute as stages
from pipeline.errors import PipelineError, shorten_error
from pipeline.store.files import read_json
from pipeline.store.run import Place
from pipeline.sweep.definition import EarlyStop


@dataclass(frozen=True)
class Task:
    """One trial's work. stop_file: of the whole study; early_stop: where and how the trial is judged."""

    place: Place
    cluster: ClusterConfig
    stop_file: Path
    early_stop: EarlyStop

    def interrupted(self) -> bool:
        """Tell whether the study is to stop."""
        return self.stop_file.exists()


def run_trial(task: Task, executor: Executor, should_continue: Callable[[int, float], bool]) -> str | None:
    """Bring the trial's run up to date, and say why it failed where it did: the other trials do not suffer from it.
    `should_continue(step, bound)` decides at each rung whether it is worth it."""
    try:
        with poll_during(partial(_forward_stop, task)):
            _run_rungs(task, executor, should_continue)
    except StopRequest:
        pass  # what is on disk says how far it came
    except Exception as error:
        return explain_error(error)
    return None


def explain_error(error: BaseException) -> str:
    """Return the reason in a user's words: the cause, without the layers that carried it."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    return " ".join(str(error).split()) if isinstance(error, PipelineError) else shorten_error(error)


def _forward_stop(task: Task) -> None:
    """Tell the training workers to stop, who look at their run directory."""
    if task.interrupted() and task.place.path.exists():
        task.place.stop_file.touch()


def _run_rungs(task: Task, executor: Executor, should_continue: Callable[[int, float], bool]) -> None:
    place = task.place

    def bring(experiment: Experiment, last: str) -> None:
        if task.interrupted():
            raise StopRequest
        stages.run_trial_stages(
            executor, task.interrupted, task.cluster, place.of(experiment), last, asked=place.experiment
        )

    for steps in task.early_stop.list_rungs(place.experiment.train.steps):
        experiment = shorten_experiment(place.experiment, steps, task.early_stop.nll_images)
        bring(experiment, "evaluate")
        metrics = read_json(place.of(experiment).metrics_json)
        if not should_continue(steps, metrics["scores"]["nll_bpd"]):
            return
    bring(place.experiment, "report")


def shorten_experiment(experiment: Experiment, steps: int, nll_images: int) -> Experiment:
    """Return the same run as far as a rung, and of its scores the bound alone.

    The run key does not hold the steps: a rung is a shorter look at the same run, which the next one extends.
    """
    return replace(
        experiment,
        train=replace(experiment.train, steps=steps),
        sample=replace(experiment.sample, checkpoint="last"),
        evaluate=replace(experiment.evaluate, metrics=("nll",), nll_images=nll_images, checkpoints=None),
    )
