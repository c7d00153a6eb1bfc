"""The registry of metrics, by the names of scores in metrics.json and MLflow, and the types of the files of scores.

A new metric is one entry here, and the code that computes it (docs/extend.md). This module imports nothing heavy:
errors in a configuration list its names.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Required

from typing_extensions import TypedDict

from pipeline.config.checks import Tree

FIRM = "\u00a0"  # a space that does not break the line
# {name: value}, and for a name x with an error its standard error x_se: or null for the reason in x_se_reason
Scores = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A metric: how its scores are named, written and compared.

    family: the entry of evaluate.metrics that gives it; None if none does.
    has_error: the score `name`_se holds its standard error.
    spread: the score that holds its standard deviation over splits or subsets, which is no error of the mean.
    bound: the value is an upper bound. detail: only tables that ask for it show it.
    protocol: what must be equal for two values to be compared, beside the data.
    """

    name: str
    family: str | None
    heading: str
    digits: int
    larger_is_better: bool = False
    spread: str = ""
    has_error: bool = True
    unit: str = ""
    bound: bool = False
    detail: bool = False
    protocol: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The heading of a column, with the unit."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading

    @property
    def best_word(self) -> str:
        return "highest" if self.larger_is_better else "lowest"

    def format(self, value: float | None, error: float | None = None) -> str:
        """Return a value as text, without the unit; to two digits of its error if that is known; a dash for None."""
        if value is None:
            return "–"
        return (f"≤{FIRM}" if self.bound else "") + format_number(value, error, self.digits)

    def format_score(self, scores: Scores) -> str:
        """Return the metric's value among these scores as text, with its error if there is one."""
        return self.format(scores.get(self.name), scores.get(f"{self.name}_se"))


IMAGES = ("n", "extractor", "rounding")
AGAINST = (*IMAGES, "reference", "reference_images")
SPLITS = (*IMAGES, "splits")
NLL = ("nll_images", "decoder", "nll_precision")
BITS = "bits/dim"

METRICS = {
    metric.name: metric
    for metric in (
        Metric("fid", "fid", "FID", 2, protocol=AGAINST),
        Metric("fid_test", "fid_test", "FID, test set", 2, protocol=(*IMAGES, "fid_test_images")),
        Metric("is_mean", "is", "IS", 2, True, spread="is_std", protocol=SPLITS),
        Metric("is_shuffled_mean", "is", "IS, shuffled", 2, True, spread="is_shuffled_std", protocol=SPLITS),
        Metric("kid_mean", "kid", "KID", 5, spread="kid_std", protocol=(*AGAINST, "kid")),
        Metric("precision", "prc", "precision", 3, True, protocol=(*AGAINST, "prc")),
        Metric("recall", "prc", "recall", 3, True, protocol=(*AGAINST, "prc")),
        Metric("as_asked", None, "share of the class asked for", 3, True, protocol=IMAGES),
        Metric("nll_bpd", "nll", "NLL", 3, unit=BITS, bound=True, protocol=NLL),
        Metric("train_nll_bpd", "nll", "NLL, training set", 3, unit=BITS, bound=True, protocol=NLL),
        Metric("rate_bpd", "nll", "rate", 3, unit=BITS, detail=True, protocol=NLL),
        Metric("distortion_bpd", "nll", "distortion", 3, unit=BITS, detail=True, protocol=NLL),
        Metric("rmse", "nll", "RMSE", 2, detail=True, protocol=NLL),
        Metric("train_loss", None, "training loss", 4, detail=True, has_error=False, protocol=("objective",)),
    )
}
LOSS = METRICS["train_loss"]
HEADLINE = tuple(METRICS[name] for name in ("fid", "is_mean", "nll_bpd"))
FAMILIES = tuple(dict.fromkeys(metric.family for metric in METRICS.values() if metric.family))
OF_SAMPLES = tuple(family for family in FAMILIES if family != "nll")


def needs_samples(families: Iterable[str]) -> bool:
    return not set(OF_SAMPLES).isdisjoint(families)


def format_number(value: float, error: float | None, digits: int, sign: str = "-") -> str:
    """Return a value with its error, both to two digits of the error; without one, to `digits` decimals."""
    tail = ""
    if error is not None and math.isfinite(error):
        if error > 0:
            digits = max(0, 1 - int(f"{error:.1e}".partition("e")[2]))
        tail = f"{FIRM}±{FIRM}{error:,.{digits}f}"
    return f"{value:{sign},.{digits}f}{tail}"


def format_headline(scores: Scores) -> str:
    """Return the headline scores as text: 'FID 3.171 ± 0.022, IS 9.46 ± 0.03'."""
    return ", ".join(f"{m.heading}{FIRM}{m.format_score(scores)}" for m in HEADLINE if m.name in scores)


def find_metric(word: str) -> Metric | None:
    """Find the metric of that name, or the first one of that family; None if there is neither."""
    family = (metric for metric in METRICS.values() if metric.family == word)
    return METRICS.get(word) or next(family, None)


def add_error(scores: Scores, name: str, error: float | None, reason: str = "") -> None:
    scores[f"{name}_se"] = error
    if error is None:
        scores[f"{name}_se_reason"] = reason


class Results(TypedDict, total=False):
    """The contents of metrics.json. `pipeline.report.page.PROTOCOL` has the keys of a protocol that pages show.

    reference_points: the scores of the baselines.
    class_shares: the share of each class among the samples, as the classifier sees them.
    """

    scores: Required[Scores]
    protocol: Required[Tree]
    reference_points: dict[str, Scores]
    class_shares: list[float]


class Bound(TypedDict, total=False):
    """The contents of nll.json, averaged over n images of the split; `images` (n,) has the bound of each.

    terms (T,) and prior in bits/dim, the MSE (T,) of x_0, and the rows of rate and distortion after k reverse steps.
    An estimate has, instead of terms, MSE and rows, the number of draws, and the standard error set_se of the NLL of
    exactly these images (null for one draw).
    """

    n: Required[int]
    prior: Required[float]
    images: list[float]
    terms: list[float]
    mse: list[float]
    rate_distortion: list[dict[str, float]]
    draws: int
    set_se: float | None
