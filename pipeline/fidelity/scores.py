"""Features -> FID and IS, in float64, from sums that merge by addition: memory does not grow with n."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from pipeline.errors import PipelineError

SPLITS = 10


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and covariance (d, d) of n features, float64."""

    n: int
    mu: np.ndarray
    sigma: np.ndarray


@dataclass(frozen=True)
class Moments:
    """n, sum f (d,) and sum f f^T (d, d) of features f, float64."""

    n: int
    first: np.ndarray
    second: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> "Moments":
        f = features.astype(np.float64)
        return Moments(len(f), f.sum(axis=0), f.T @ f)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.first + other.first, self.second + other.second)

    def statistics(self) -> Statistics:
        """Mean and unbiased covariance. Raises PipelineError for a single image, which has none."""
        if self.n < 2:
            raise PipelineError(
                "one image has no FID; ask for more of them, or take fid out of evaluate.metrics"
            )
        mu = self.first / self.n
        return Statistics(self.n, mu, (self.second - self.n * np.outer(mu, mu)) / (self.n - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """FID between two sets of features."""
    pair = ({"mu": s.mu, "sigma": s.sigma} for s in (a, b))
    return fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]


@dataclass(frozen=True)
class ProbabilitySums:
    """Per split: the number of images, sum p (splits, classes) and sum p log p, float64."""

    n: np.ndarray
    p: np.ndarray
    p_log_p: np.ndarray

    @staticmethod
    def of(logits: np.ndarray, start: int, total: int, splits: int) -> "ProbabilitySums":
        """Of images [start, start + len(logits)) out of `total`: split i holds [i*total//splits, ...)."""
        log_p = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
        p = np.exp(log_p)
        ends = [(i + 1) * total // splits for i in range(splits)]
        member = np.searchsorted(ends, np.arange(start, start + len(p)), side="right")
        one_hot = (member[None, :] == np.arange(splits)[:, None]).astype(np.float64)
        return ProbabilitySums(one_hot.sum(axis=1), one_hot @ p, one_hot @ (p * log_p).sum(axis=1))

    def __add__(self, other: "ProbabilitySums") -> "ProbabilitySums":
        return ProbabilitySums(self.n + other.n, self.p + other.p, self.p_log_p + other.p_log_p)

    def inception_score(self) -> tuple[float, float]:
        """Mean and (population) standard deviation over the splits of exp E KL(p(y|x) || p(y))."""
        q = self.p / self.n[:, None]
        negative_entropy = np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0).sum(axis=1)
        scores = np.exp(self.p_log_p / self.n - negative_entropy)
        return float(scores.mean()), float(scores.std())


@dataclass(frozen=True)
class Scored:
    """What n images score: `sums` and `classes` (n,), that of the largest logit, where there are classes."""

    moments: Moments
    sums: ProbabilitySums | None
    classes: np.ndarray | None


def score(parts: Iterable[tuple[np.ndarray, np.ndarray]], n: int) -> Scored:
    """Sum up the features and logits of n images, which come in order, in parts of any size.

    Raises PipelineError where they are not exactly n.
    """
    splits, start = min(SPLITS, n), 0
    scored: Scored | None = None
    for features, logits in parts:
        part = _score_part(features, logits, start, n, splits)
        scored = part if scored is None else _add(scored, part)
        start += len(features)
    if scored is None or start != n:
        raise PipelineError(f"{start} images are there where {n} are to be scored; a short set has no score")
    return scored


def _score_part(features: np.ndarray, logits: np.ndarray, start: int, n: int, splits: int) -> Scored:
    if not logits.shape[1]:
        return Scored(Moments.of(features), None, None)
    sums = ProbabilitySums.of(logits, start, n, splits)
    return Scored(Moments.of(features), sums, logits.argmax(axis=1))


def _add(a: Scored, b: Scored) -> Scored:
    moments = a.moments + b.moments
    if a.sums is None or b.sums is None or a.classes is None or b.classes is None:
        return Scored(moments, None, None)
    return Scored(moments, a.sums + b.sums, np.concatenate([a.classes, b.classes]))
