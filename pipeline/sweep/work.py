"""What the process of one trial does: the stages of its run, by way of the rungs where trials are stopped early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.compute.interrupt import Interrupted
from pipeline.compute.resources import Resources
from pipeline.compute.work import Executor
from pipeline.config import ClusterConfig, Experiment
from pipeline.console import following
from pipeline.engine import execute as stages
from pipeline.store.files import read_json
from pipeline.store.run import Place


@dataclass(frozen=True)
class Order:
    """One trial's work. stop_file: of the whole sweep; rungs: the steps at which it is judged, by its bound on
    nll_images test images."""

    experiment: Experiment
    run: Place
    cluster: ClusterConfig
    resources: Resources
    stop_file: Path
    rungs: tuple[int, ...]
    nll_images: int

    def interrupted(self) -> bool:
        """Whether the sweep is to stop."""
        return self.stop_file.exists()

    def pass_on(self) -> None:
        """Tell the training workers, who look at their run directory."""
        if self.interrupted() and self.run.path.exists():
            self.run.stop_file.touch()


def carry_out(order: Order, executor: Executor, goes_on: Callable[[int, float], bool]) -> None:
    """Bring the trial's run up to date. `goes_on(step, bound)` decides at each rung whether it is worth it.

    Raises Interrupted, PipelineError.
    """
    with following(order.pass_on):
        for steps in order.rungs:
            bound = _bound_at(order, executor, steps)
            if not goes_on(steps, bound):
                return
        _bring(order, executor, order.experiment, "report")


def _bound_at(order: Order, executor: Executor, steps: int) -> float:
    """The NLL bound after so many steps. The run key does not hold the steps: a rung is a shorter look at the
    same run, which the next one extends."""
    experiment = at_rung(order.experiment, steps, order.nll_images)
    _bring(order, executor, experiment, "evaluate")
    folder = order.run.of(experiment).scores
    return float(read_json(folder / "metrics.json")["scores"]["nll_bpd"])


def at_rung(experiment: Experiment, steps: int, nll_images: int) -> Experiment:
    """The same run, so far, and of its scores the bound alone."""
    bound = replace(experiment.evaluate, metrics=("nll",), nll_images=nll_images, checkpoints=None)
    return replace(
        experiment,
        train=replace(experiment.train, steps=steps),
        sample=replace(experiment.sample, checkpoint="last"),
        evaluate=bound,
    )


def _bring(order: Order, executor: Executor, experiment: Experiment, last: str) -> None:
    if order.interrupted():
        raise Interrupted
    stages.execute_within(
        executor, order.interrupted, experiment, order.cluster, order.run, last, asked=order.experiment
    )
