"""Features -> FID, IS, KID, precision and recall.

FID and IS come from float64 sums that merge by addition, so their memory does not grow with the number of
images (but for a byte of each image's split). KID, precision and recall compare single images: they take all
features at once, and are torch-fidelity's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from pipeline.errors import PipelineError

# torch-fidelity's own settings: with others its numbers and ours would differ.
SPLITS: int = DEFAULTS["isc_splits"]
SEED: int = DEFAULTS["rng_seed"]
KID_SUBSETS: int = DEFAULTS["kid_subsets"]
KID_SUBSET_SIZE: int = DEFAULTS["kid_subset_size"]
NEIGHBOURS: int = DEFAULTS["prc_neighborhood"]


# FID


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and covariance (d, d) of n features, float64; n is None where it is not known."""

    n: int | None
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


# IS


def splits_in_order(n: int) -> np.ndarray:
    """Which split each of n images is in, int8 (n,): the i-th holds [i n // splits, (i + 1) n // splits)."""
    splits = min(SPLITS, n)
    ends = [(i + 1) * n // splits for i in range(splits)]
    return np.searchsorted(ends, np.arange(n), side="right").astype(np.int8)


def splits_shuffled(n: int) -> np.ndarray:
    """The same after torch-fidelity's permutation, whose k-th place holds image permutation[k]."""
    member = np.empty(n, np.int8)
    member[np.random.RandomState(SEED).permutation(n)] = splits_in_order(n)
    return member


@dataclass(frozen=True)
class ProbabilitySums:
    """Per split: the number of images, sum p (splits, classes) and sum p log p, float64."""

    n: np.ndarray
    p: np.ndarray
    p_log_p: np.ndarray

    @staticmethod
    def of(log_p: np.ndarray, member: np.ndarray, splits: int) -> "ProbabilitySums":
        """Of log probabilities (n, classes) of images that are in the splits member (n,)."""
        p = np.exp(log_p)
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


# Both, from features that come in parts


@dataclass(frozen=True)
class Scored:
    """What n images score. Where there are classes: `sums` over splits in the images' order, `shuffled` over
    torch-fidelity's, and `classes` (n,), that of each image's largest logit."""

    moments: Moments
    sums: ProbabilitySums | None
    shuffled: ProbabilitySums | None
    classes: np.ndarray | None


def score(parts: Iterable[tuple[np.ndarray, np.ndarray]], n: int) -> Scored:
    """Sum up the features and logits of n images, which come in order, in parts of any size.

    Raises PipelineError where they are not exactly n.
    """
    splits, in_order, shuffled = min(SPLITS, n), splits_in_order(n), splits_shuffled(n)
    scored: Scored | None = None
    start = 0
    for features, logits in parts:
        rows = slice(start, start + len(features))
        start = rows.stop
        if start <= n:
            part = _score_part(features, logits, in_order[rows], shuffled[rows], splits)
            scored = part if scored is None else _add(scored, part)
    if scored is None or start != n:
        raise PipelineError(f"{start} images are there where {n} are to be scored; a short set has no score")
    return scored


def _score_part(
    features: np.ndarray, logits: np.ndarray, in_order: np.ndarray, shuffled: np.ndarray, splits: int
) -> Scored:
    moments = Moments.of(features)
    if not logits.shape[1]:
        return Scored(moments, None, None, None)
    log_p = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
    return Scored(
        moments,
        ProbabilitySums.of(log_p, in_order, splits),
        ProbabilitySums.of(log_p, shuffled, splits),
        logits.argmax(axis=1).astype(np.int16),
    )


def _add(a: Scored, b: Scored) -> Scored:
    moments = a.moments + b.moments
    if a.sums is None or b.sums is None or a.shuffled is None or b.shuffled is None:
        return Scored(moments, None, None, None)
    assert a.classes is not None and b.classes is not None
    classes = np.concatenate([a.classes, b.classes])
    return Scored(moments, a.sums + b.sums, a.shuffled + b.shuffled, classes)


# KID, precision and recall, from all features at once


def kid_subset_size(n: int, n_reference: int) -> int:
    """torch-fidelity's, or half of a set that has fewer images: the whole of it 100 times would show no spread.

    Raises PipelineError where nothing can be estimated from the half.
    """
    smallest = min(n, n_reference)
    if smallest < 4:
        raise PipelineError(
            f"{smallest} images have no KID, which needs 4; ask for more of them, or take kid out of evaluate.metrics"
        )
    return KID_SUBSET_SIZE if smallest >= KID_SUBSET_SIZE else smallest // 2


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """KID between features (n, d) and (m, d), float32: mean and standard deviation over random subsets."""
    found = kid_features_to_metric(
        torch.from_numpy(features),
        torch.from_numpy(reference),
        kid_subset_size=kid_subset_size(len(features), len(reference)),
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision_recall(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al. 2019) of features (n, d) against (m, d), float32.

    Raises PipelineError where an image has fewer neighbours than are looked at.
    """
    if min(len(features), len(reference)) <= NEIGHBOURS:
        raise PipelineError(
            f"{min(len(features), len(reference))} images have no precision and recall, which look at "
            f"{NEIGHBOURS} neighbours of each; ask for more of them, or take prc out of evaluate.metrics"
        )
    found = prc_features_to_metric(
        torch.from_numpy(features), torch.from_numpy(reference), save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
