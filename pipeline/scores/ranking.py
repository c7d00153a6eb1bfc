"""The order of runs and trials of equal protocol, by the mean score over seeds.

Rows whose difference from the best of them is within its error share a rank, '1-3'.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from pipeline.config import Experiment, to_dict
from pipeline.config.checks import Tree
from pipeline.scores.metrics import Metric, Scores, format_number

LEVEL = 0.05  # of the tests that tell rows apart, for all rows of a band together
MANY = 1e9  # degrees of freedom if they are not known


class ScoredRun(Protocol):
    """Interface of a run or a trial that can be ranked.

    swept: the values that tell it from the others; runs that differ in the seed alone are one point.
    data: names its images. protocol: how its scores were made.
    image_bounds: the seed of the noise, and the bound of each image in order, empty if it is not known.
    """

    @property
    def label(self) -> str: ...
    @property
    def swept(self) -> Mapping[str, Any]: ...
    @property
    def data(self) -> str: ...
    @property
    def scores(self) -> Scores: ...
    @property
    def protocol(self) -> Mapping[str, Any]: ...
    @property
    def image_bounds(self) -> tuple[int, Sequence[float]]: ...


R = TypeVar("R", bound=ScoredRun)


class Difference(NamedTuple):
    """The difference of two rows, its standard error if known, and the p-value of no difference."""

    value: float
    error: float | None
    p: float


@dataclass(frozen=True)
class RankedPoint(Generic[R]):
    """A row: one run, or the mean of runs that differ in the seed alone.

    error: the standard error of one run; of several the standard deviation over their seeds.
    rank: 1 is the best; '1-3' for three rows that do not differ significantly. difference: from the first row.
    """

    runs: Sequence[R]
    name: str
    mean: float
    error: float | None
    rank: str
    difference: Difference


@dataclass(frozen=True)
class RankedGroup(Generic[R]):
    """Runs of equal protocol in one metric, the best point first. protocol: their common entries."""

    protocol: Tree
    points: Sequence[RankedPoint[R]]

    @property
    def runs(self) -> list[R]:
        return [run for point in self.points for run in point.runs]


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


def summarize_scores(runs: Sequence[ScoredRun], metric: Metric) -> tuple[float | None, float | None]:
    """Return a run's score and its error, or the mean and the standard deviation over several seeds."""
    values = [run.scores[metric.name] for run in runs if metric.name in run.scores]
    if len(values) > 1:
        return mean(values), stdev(values)
    return (values[0], runs[0].scores.get(f"{metric.name}_se")) if values else (None, None)


def _rank_group(runs: Sequence[R], metric: Metric) -> RankedGroup[R]:
    """Rank runs of equal protocol; runs that differ in the seed alone are one point."""
    alike: dict[str, list[R]] = {}
    for run in runs:
        alike.setdefault(json.dumps(drop_seed(run), default=str), []).append(run)
    sign = -1 if metric.larger_is_better else 1
    means = {point: mean(run.scores[metric.name] for run in own) for point, own in alike.items()}
    order = sorted(alike, key=lambda point: (sign * means[point], alike[point][0].label))
    ranks, rest, points = dict[str, str](), list(order), []
    while rest:
        band = _find_tied_rows([alike[point] for point in rest], metric)
        first, last = len(ranks) + 1, len(ranks) + len(band)
        ranks |= {rest[at]: f"{first}-{last}" if last > first else f"{first}" for at in band}
        rest = [point for point in rest if point not in ranks]
    for point in order:
        own, name = alike[point], alike[point][0].label
        if len(own) > 1:
            name = format_swept_values(drop_seed(own[0])) or ", ".join(run.label for run in own)
        difference = _compare(alike[order[0]], own, metric)
        error = summarize_scores(own, metric)[1]
        points.append(RankedPoint(own, name, means[point], error, ranks[point], difference))
    shared = {key: runs[0].protocol[key] for key in metric.protocol if runs[0].protocol.get(key) is not None}
    return RankedGroup({"data": runs[0].data, **shared}, points)


def _find_tied_rows(rows: Sequence[Sequence[ScoredRun]], metric: Metric) -> list[int]:
    """Return the rows whose difference from the first one is not significant (Holm's procedure over all rows)."""
    tests = sorted((_compare(rows[0], row, metric).p, number) for number, row in enumerate(rows[1:], 1))
    significant = 0
    while significant < len(tests) and tests[significant][0] * (len(tests) - significant) <= LEVEL:
        significant += 1
    return [0, *(number for _, number in tests[significant:])]


def _compare(best: Sequence[ScoredRun], row: Sequence[ScoredRun], metric: Metric) -> Difference:
    """Compare the means of two rows: image by image if images and noise are the same, otherwise by their errors.

    If an error is not known, any difference counts as significant.
    """
    from scipy.special import stdtr

    difference = mean(run.scores[metric.name] for run in row) - mean(run.scores[metric.name] for run in best)
    (error, freedom), (row_error, row_freedom) = _find_error(best, metric), _find_error(row, metric)
    (seed, bounds), (row_seed, row_bounds) = best[0].image_bounds, row[0].image_bounds
    found: float | None = None
    is_paired = metric.bound and len(best) == len(row) == 1 and seed == row_seed
    if is_paired and len(bounds) == len(row_bounds) > 1:
        spread, freedom = float(np.std(np.subtract(row_bounds, bounds), ddof=1)), len(bounds) - 1
        found = spread / len(bounds) ** 0.5
    elif error is not None and row_error is not None and error + row_error > 0:
        a, b = error**2, row_error**2
        found, freedom = (a + b) ** 0.5, (a + b) ** 2 / (a**2 / freedom + b**2 / row_freedom)  # Welch
    p = 2 * float(stdtr(freedom, -abs(difference) / found)) if found else float(difference == 0)
    return Difference(difference, found, p)


def _find_error(runs: Sequence[ScoredRun], metric: Metric) -> tuple[float | None, float]:
    """Return the standard error of the mean of a row, and its degrees of freedom."""
    error = summarize_scores(runs, metric)[1]
    if len(runs) > 1 and error is not None:
        return error / len(runs) ** 0.5, len(runs) - 1
    count = runs[0].protocol.get("nll_images" if metric.family == "nll" else "jackknife_groups")
    return error, count - 1 if count and count > 1 else MANY


def drop_seed(run: ScoredRun) -> Tree:
    """Return a run's swept values without the seed: they identify its point."""
    return {key: value for key, value in run.swept.items() if key != "seed"}


def format_swept_values(swept: Mapping[str, Any]) -> str:
    """Return swept values as text, 'cosine dropout=0.1': a number needs its key, a word does not."""
    return " ".join(
        value if isinstance(value, str) else f"{key.rpartition('.')[2]}={json.dumps(value)}"
        for key, value in swept.items()
    )


def describe_best(groups: Sequence[RankedGroup[R]], metric: Metric) -> str:
    """Describe the best run, or why there is none, in a sentence without its full stop."""
    if not groups:
        return f"No run has a score of {metric.heading} yet"
    if len(groups) > 1:
        return f"No common order: the runs were scored by {len(groups)} protocols, and each has an order of its own"
    points = groups[0].points
    first, band = points[0], [point for point in points if point.rank == points[0].rank]
    over = f", mean of {len(first.runs)} seeds" if len(first.runs) > 1 else ""
    over += " (two give no usable interval)" if len(first.runs) == 2 else ""
    rest = f"; {len(band) - 1} of the others cannot be told from it" if len(band) > 1 else ""
    value = metric.format(first.mean, first.error)
    return f"{first.name} has the {metric.best_word} {metric.heading} of {len(points)}: {value}{over}{rest}"


def format_difference(point: RankedPoint[R], metric: Metric) -> str:
    """Return the difference from the first row as text; a dash for that row itself."""
    if not point.difference.value:
        return "–"
    return format_number(point.difference.value, point.difference.error, metric.digits, "+")


def explain_ranks(points: Sequence[RankedPoint[R]]) -> str:
    """Explain the errors and the ranks of a leaderboard, in a sentence without its full stop; '' if it has neither."""
    sizes = {len(point.runs) for point in points}
    several = ", of several seeds their standard deviation" if sizes - {1} else ""
    parts = {
        f"± is the standard error{several}": any(point.error is not None for point in points),
        "two seeds give no usable interval (t = 12.7)": 2 in sizes,
        "rows that share a rank cannot be told from the best (95 %)": any("-" in p.rank for p in points),
    }
    return "; ".join(text for text, holds in parts.items() if holds)


def describe_objective(experiment: Experiment) -> Tree:
    """Return the settings of the loss, without the data; runs with equal ones have comparable losses."""
    diffusion = to_dict(experiment.diffusion)
    if experiment.diffusion.loss == "simple" and experiment.diffusion.variance.startswith("fixed"):
        diffusion.pop("variance")
    return diffusion
