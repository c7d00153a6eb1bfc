"""Features -> FID, IS, KID, precision and recall.

FID and IS come from float64 sums that merge by addition, so their memory does not grow with the number of images
(but for a byte of each image's split). KID, precision and recall compare single images: they take all features at
once. The last step of each is torch-fidelity's own; its import takes seconds, so it waits for the call.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import PipelineError

# torch-fidelity's defaults: with others its numbers and ours would differ. A test compares them.
SPLITS, SEED = 10, 2020
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3


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
        """Return mean and unbiased covariance. Raises PipelineError for a single image, which has none."""
        if self.n < 2:
            raise PipelineError(
                "one image has no FID; ask for more of them, or take fid out of evaluate.metrics"
            )
        mu = self.first / self.n
        return Statistics(self.n, mu, (self.second - self.n * np.outer(mu, mu)) / (self.n - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Compute the FID between two sets of features."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    pair = ({"mu": s.mu, "sigma": s.sigma} for s in (a, b))
    return float(fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID])


# IS


def splits_in_order(n: int) -> np.ndarray:
    """Say which split each of n images is in, int8 (n,): the i-th holds [i n // splits, (i + 1) n // splits)."""
    splits = min(SPLITS, n)
    ends = [(i + 1) * n // splits for i in range(splits)]
    return np.searchsorted(ends, np.arange(n), side="right").astype(np.int8)


def splits_shuffled(n: int) -> np.ndarray:
    """Do the same after torch-fidelity's permutation, whose k-th place holds image permutation[k]."""
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
        """Return mean and (population) standard deviation over the splits of exp E KL(p(y|x) || p(y))."""
        q = self.p / self.n[:, None]
        negative_entropy = np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0).sum(axis=1)
        scores = np.exp(self.p_log_p / self.n - negative_entropy)
        return float(scores.mean()), float(scores.std())


# Both, from features that come in parts


@dataclass(frozen=True)
class FeatureSums:
    """What the features of n images add up to. Where there are classes: `sums` over splits in the images' order,
    `shuffled` over torch-fidelity's, and `classes` (n,) int16, that of each image's largest logit."""

    moments: Moments
    sums: ProbabilitySums | None = None
    shuffled: ProbabilitySums | None = None
    classes: np.ndarray | None = None


def sum_features(parts: Iterable[tuple[np.ndarray, np.ndarray]], n: int) -> FeatureSums:
    """Sum up the features (m, d) and logits (m, classes) of n images, which come in order, in parts of any size.

    Raises PipelineError where they are not exactly n.
    """
    members, start = (splits_in_order(n), splits_shuffled(n)), 0
    moments: Moments | None = None
    sums: list[ProbabilitySums] = []
    classes: list[np.ndarray] = []
    for features, logits in parts:
        rows = slice(start, start + len(features))
        start = rows.stop
        if start > n:
            continue
        own = Moments.of(features)
        moments = own if moments is None else moments + own
        if logits.shape[1]:
            log_p = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
            added = [ProbabilitySums.of(log_p, member[rows], min(SPLITS, n)) for member in members]
            sums = [a + b for a, b in zip(sums, added, strict=True)] if sums else added
            classes.append(logits.argmax(axis=1).astype(np.int16))
    if moments is None or start != n:
        raise PipelineError(f"{start} images are there where {n} are to be scored; a short set has no score")
    return FeatureSums(moments, sums[0], sums[1], np.concatenate(classes)) if sums else FeatureSums(moments)


# KID, precision and recall, from all features at once


def kid_subset_size(n: int, n_reference: int) -> int:
    """Return torch-fidelity's size, or half of a set that has fewer images: the whole of it would show no spread.

    Raises PipelineError where nothing can be estimated from the half.
    """
    smallest = min(n, n_reference)
    if smallest < 4:
        raise PipelineError(
            f"{smallest} images have no KID, which needs 4; ask for more of them, or take kid out of evaluate.metrics"
        )
    return KID_SUBSET_SIZE if smallest >= KID_SUBSET_SIZE else smallest // 2


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Compute the KID between features (n, d) and (m, d), float32: mean and standard deviation over random subsets."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        torch.from_numpy(features),
        torch.from_numpy(reference),
        kid_subset_size=kid_subset_size(len(features), len(reference)),
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision_recall(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Compute precision and recall (Kynkaanniemi et al. 2019) of features (n, d) against (m, d), float32.

    Raises PipelineError where an image has fewer neighbours than are looked at.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    smallest = min(len(features), len(reference))
    if smallest <= NEIGHBOURS:
        raise PipelineError(
            f"{smallest} images have no precision and recall, which look at "
            f"{NEIGHBOURS} neighbours of each; ask for more of them, or take prc out of evaluate.metrics"
        )
    found = prc_features_to_metric(
        torch.from_numpy(features), torch.from_numpy(reference), save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
