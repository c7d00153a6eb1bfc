"""FID, IS, KID, precision and recall of features.

FID and IS come from float64 sums that merge by addition, so their memory does not grow with the number of images,
except for a few bytes for each image. KID, precision and recall compare single images, so they take all features at
once. The last step of FID, KID, precision and recall is torch-fidelity's own; its import takes seconds, so the
functions import it.
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


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and covariance (d, d) of n features, float64; n is None if it is not known."""

    n: int | None
    mu: np.ndarray
    sigma: np.ndarray

    def factor_covariance(self) -> np.ndarray:
        """Return A (d, d) with A A^T = sigma."""
        values, vectors = np.linalg.eigh(self.sigma)
        factor: np.ndarray = vectors * np.sqrt(values.clip(min=0))
        return factor


@dataclass(frozen=True)
class Reference:
    """The reference of a comparison: statistics for each FID, single features `real` (m, d), and their scale `rms`."""

    statistics: dict[str, Statistics]
    real: np.ndarray | None
    rms: float


@dataclass(frozen=True)
class Moments:
    """The sums that give mean and covariance of n features f: sum f (d,) and sum f f^T (d, d), float64."""

    n: int
    first: np.ndarray
    second: np.ndarray

    @staticmethod
    def from_features(features: np.ndarray) -> "Moments":
        """Sum up features (n, d)."""
        f = features.astype(np.float64)
        return Moments(len(f), f.sum(axis=0), f.T @ f)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.first + other.first, self.second + other.second)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.n - other.n, self.first - other.first, self.second - other.second)

    def to_statistics(self) -> Statistics:
        """Return mean and unbiased covariance. Raises PipelineError for a single image, which has none."""
        if self.n < 2:
            raise PipelineError("one image has no FID; ask for more, or take fid out of evaluate.metrics")
        mu = self.first / self.n
        return Statistics(self.n, mu, (self.second - self.n * np.outer(mu, mu)) / (self.n - 1))


def compute_fid(a: Statistics, b: Statistics) -> float:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    pair = ({"mu": s.mu, "sigma": s.sigma} for s in (a, b))
    value = float(fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID])
    return max(value, 0.0)  # rounding puts the distance of equal sets below 0; nan stays nan


@dataclass(frozen=True)
class ProbabilitySums:
    """The sums that give the IS of each split: its images, sum p (splits, classes) and sum p log p, float64."""

    n: np.ndarray
    p: np.ndarray
    p_log_p: np.ndarray

    @staticmethod
    def from_log_probabilities(log_p: np.ndarray, member: np.ndarray, splits: int) -> "ProbabilitySums":
        """Sum up the log probabilities (n, classes) of images that are in the splits `member` (n,)."""
        p = np.exp(log_p)
        one_hot = (member[None, :] == np.arange(splits)[:, None]).astype(np.float64)
        return ProbabilitySums(one_hot.sum(axis=1), one_hot @ p, one_hot @ (p * log_p).sum(axis=1))

    def __add__(self, other: "ProbabilitySums") -> "ProbabilitySums":
        return ProbabilitySums(self.n + other.n, self.p + other.p, self.p_log_p + other.p_log_p)

    def compute_inception_score(self) -> tuple[float, float]:
        """Return mean and (population) standard deviation over the splits of exp E KL(p(y|x) || p(y))."""
        q = self.p / self.n[:, None]
        negative_entropy = np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0).sum(axis=1)
        scores = np.exp(self.p_log_p / self.n - negative_entropy)
        return float(scores.mean()), float(scores.std())


@dataclass(frozen=True)
class FeatureSums:
    """The sums over the features of n images, enough for FID and IS.

    If there are classes, `in_order` is over splits in the images' order, `shuffled` over torch-fidelity's splits, and
    `classes` (n,) int16 has the class of each image's largest logit. Splits of one image have the IS 1, whatever the
    image: a set that has no more images than splits has none.
    """

    moments: Moments
    in_order: ProbabilitySums | None = None
    shuffled: ProbabilitySums | None = None
    classes: np.ndarray | None = None


def sum_features(parts: Iterable[tuple[np.ndarray, np.ndarray]], n: int) -> FeatureSums:
    """Sum up the features (m, d) and logits (m, classes) of n images, which come in order, in parts of any size.

    The i-th split holds the images [i n // splits, (i + 1) n // splits), in their order or in torch-fidelity's
    permutation. Raises PipelineError if they are not exactly n images.
    """
    start = 0
    in_order = np.repeat(np.arange(SPLITS, dtype=np.int8), np.diff(np.arange(SPLITS + 1) * n // SPLITS))
    shuffled = np.empty_like(in_order)
    shuffled[np.random.RandomState(SEED).permutation(n)] = in_order
    moments: Moments | None = None
    sums: list[ProbabilitySums] = []
    classes: list[np.ndarray] = []
    for features, logits in parts:
        rows = slice(start, start + len(features))
        start = rows.stop
        if start > n:
            continue
        own = Moments.from_features(features)
        moments = own if moments is None else moments + own
        if logits.shape[1]:
            log_p = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
            members = in_order[rows], shuffled[rows]
            added = [ProbabilitySums.from_log_probabilities(log_p, member, SPLITS) for member in members]
            sums = [a + b for a, b in zip(sums, added, strict=True)] if sums else added
            classes.append(logits.argmax(axis=1).astype(np.int16))
    if moments is None or start != n:
        raise PipelineError(f"{start} images are there, but {n} are to be scored; a smaller set has no score")
    in_order_sums, shuffled_sums = sums if n > SPLITS and sums else (None, None)
    return FeatureSums(moments, in_order_sums, shuffled_sums, np.concatenate(classes) if classes else None)


def choose_kid_subset_size(n: int, n_reference: int) -> int:
    """Return torch-fidelity's subset size, or half of a smaller set: subsets of all images would be equal.

    Raises PipelineError if nothing can be estimated from the half.
    """
    smallest = min(n, n_reference)
    if smallest < 4:
        raise PipelineError(
            f"{smallest} images have no KID, which needs 4; ask for more, or take kid out of evaluate.metrics"
        )
    return KID_SUBSET_SIZE if smallest >= KID_SUBSET_SIZE else smallest // 2


def compute_kid(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Compute the KID between features (n, d) and (m, d), float32: mean and standard deviation over random subsets."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        torch.from_numpy(features), torch.from_numpy(reference),
        kid_subset_size=choose_kid_subset_size(len(features), len(reference)), verbose=False,
    )  # fmt: skip
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def compute_precision_recall(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Compute precision and recall (Kynkaanniemi et al. 2019) of features (n, d) against (m, d), float32.

    Raises PipelineError if an image has too few neighbours.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    smallest = min(len(features), len(reference))
    if smallest <= NEIGHBOURS:
        raise PipelineError(
            f"{smallest} images have no precision and recall, which look at {NEIGHBOURS} neighbours of each; "
            "ask for more, or take prc out of evaluate.metrics"
        )
    found = prc_features_to_metric(
        torch.from_numpy(features), torch.from_numpy(reference), save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
