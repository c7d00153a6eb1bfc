"""The order of runs and trials of equal protocol, by the mean score over seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Generic, Protocol, TypeVar

from pipeline.config import Experiment, to_dict
from pipeline.config.checks import Tree
from pipeline.scores.metrics import Metric


class ScoredRun(Protocol):
    """A run or a trial that can be ranked.

    swept: the values that tell it from the others; runs that differ in the seed alone are one point.
    data: names its images. protocol: says how its scores came about.
    """

    @property
    def label(self) -> str: ...
    @property
    def swept(self) -> Mapping[str, Any]: ...
    @property
    def data(self) -> str: ...
    @property
    def scores(self) -> Mapping[str, float]: ...
    @property
    def protocol(self) -> Mapping[str, Any]: ...


R = TypeVar("R", bound=ScoredRun)


@dataclass(frozen=True)
class RankedPoint:
    """A point with its rank (1 = best; equals share one), and mean and standard deviation over its seeds."""

    rank: int
    name: str
    mean: float
    spread: float | None
    seeds: int


@dataclass(frozen=True)
class RankedGroup(Generic[R]):
    """Runs of equal protocol in one metric, the best point first. `protocol` is what they share."""

    protocol: Tree
    ranked: Sequence[tuple[R, RankedPoint]]

    @property
    def runs(self) -> list[R]:
        return [run for run, _ in self.ranked]

    @property
    def has_several_seeds(self) -> bool:
        return any(position.seeds > 1 for _, position in self.ranked)


def rank_runs(runs: Sequence[R], metric: Metric) -> list[RankedGroup[R]]:
    """Group runs of equal protocol, the largest group first, and rank each group.

    Scores of different protocols have no common order. A run without the score is left out.
    """
    alike: dict[tuple[str, ...], list[R]] = {}
    for run in runs:
        if metric.name in run.scores:
            signature = run.data, *(str(run.protocol.get(key)) for key in metric.protocol)
            alike.setdefault(signature, []).append(run)
    return [_rank_group(own, metric) for own in sorted(alike.values(), key=len, reverse=True)]


def _rank_group(runs: Sequence[R], metric: Metric) -> RankedGroup[R]:
    """Rank runs of equal protocol; runs that differ in the seed alone are one point."""
    points: dict[str, list[R]] = {}
    for run in runs:
        points.setdefault(json.dumps(_drop_seed(run), default=str), []).append(run)
    means = {point: mean(run.scores[metric.name] for run in own) for point, own in points.items()}
    sign = -1 if metric.larger_is_better else 1
    ranked = []
    for point, own in sorted(points.items(), key=lambda item: (sign * means[item[0]], item[1][0].label)):
        better = sum(sign * other < sign * means[point] for other in means.values())
        name, spread = own[0].label, None
        if len(own) > 1:
            name = format_swept_values(_drop_seed(own[0])) or ", ".join(run.label for run in own)
            spread = stdev(run.scores[metric.name] for run in own)
        ranked += [(run, RankedPoint(better + 1, name, means[point], spread, len(own))) for run in own]
    shared = {key: runs[0].protocol[key] for key in metric.protocol if runs[0].protocol.get(key) is not None}
    return RankedGroup({"data": runs[0].data, **shared}, ranked)


def _drop_seed(run: ScoredRun) -> Tree:
    return {key: value for key, value in run.swept.items() if key != "seed"}


def format_swept_values(swept: Mapping[str, Any]) -> str:
    """Return swept values as text, 'cosine dropout=0.1': a number needs its key, a word does not."""
    return " ".join(
        value if isinstance(value, str) else f"{key.rpartition('.')[2]}={json.dumps(value)}"
        for key, value in swept.items()
    )


def describe_best(groups: Sequence[RankedGroup[R]], metric: Metric) -> str:
    """Return a sentence, without its full stop, that names the best run or says why there is none."""
    if not groups:
        return f"No run has a score of {metric.heading} yet"
    if len(groups) > 1:
        return f"No common order: the runs were scored by {len(groups)} protocols, and each has an order of its own"
    positions = dict.fromkeys(position for _, position in groups[0].ranked)
    first = [position for position in positions if position.rank == 1]
    verb = "has" if len(first) == 1 else "have"
    over = f", mean of {first[0].seeds} seeds" if first[0].seeds > 1 else ""
    value = metric.format(first[0].mean, first[0].spread)
    names = " and ".join(position.name for position in first)
    return f"{names} {verb} the {metric.best_word} {metric.heading} of {len(positions)}: {value}{over}"


def describe_objective(experiment: Experiment) -> Tree:
    """Return the settings of the loss, without the data; runs with equal ones have comparable losses."""
    diffusion = to_dict(experiment.diffusion)
    if experiment.diffusion.loss == "simple" and experiment.diffusion.variance.startswith("fixed"):
        diffusion.pop("variance")
    return diffusion
