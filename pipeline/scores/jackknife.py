"""Standard errors of the scores of features by the jackknife: each score again without one group of images.

A bootstrap would be wrong: a set with repeated images acts as a smaller set, whose FID is higher. No network is called.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.scores import distances
from pipeline.scores.distances import NEIGHBOURS, Moments, Reference
from pipeline.scores.image_sets import ImageSet
from pipeline.scores.metrics import Scores

MOST_GROUPS = 20
LEAST_IMAGES = 3 * distances.SPLITS  # with fewer, the IS has no splits without a group
BLOCK = 1000  # rows of a matrix of distances
Values = Sequence[float] | np.ndarray


def compute_jackknife_error(without: Values) -> float:
    """Compute the standard error from m scores F, each without one of m groups: sqrt((m-1)/m sum (F - mean)^2)."""
    return float(np.std(without) * (len(without) - 1) ** 0.5)


def compute_errors(
    images: ImageSet, groups: int, whole: Moments, target: Reference, scores: Scores
) -> dict[str, float]:
    """Compute the errors {score: error} of a set, whose moments are `whole`, from equal groups of its images."""
    member = np.arange(images.n) * groups // images.n
    without = dict[str, Values](recompute_fid(images, member, whole, target))
    if "is_mean" in scores:
        without |= recompute_is(images, member)
    if target.real is not None:
        features = images.read_features()
        if "kid_mean" in scores:
            without["kid_mean"] = recompute_kid(features / target.rms, target.real / target.rms, member)
        if "recall" in scores:
            found = recompute_precision_recall(features, target.real, member)
            without["precision"], without["recall"] = found
    errors = {name: compute_jackknife_error(values) for name, values in without.items()}
    if "kid_mean" in scores:  # a mean over random subsets, whose choice adds a variance of its own
        of_choice = scores["kid_std"] / distances.KID_SUBSETS**0.5
        errors["kid_mean"] = float(np.hypot(errors["kid_mean"], of_choice))
    return errors


def recompute_fid(
    images: ImageSet, member: np.ndarray, whole: Moments, target: Reference
) -> dict[str, list[float]]:
    """Compute the FIDs again without each group, from the moments of all images less those of the group.

    The trace is that of the symmetric form, which takes a tenth of the time.
    """
    factors = {name: other.factor_covariance() for name, other in target.statistics.items()}
    found: dict[str, list[float]] = {name: [] for name in factors}
    for group in _sum_groups(images, member) if factors else ():
        own = (whole - group).to_statistics()
        for name, other in target.statistics.items():
            roots = np.linalg.eigvalsh(factors[name].T @ own.sigma @ factors[name]).clip(min=0) ** 0.5
            trace = np.trace(own.sigma) + np.trace(other.sigma) - 2 * roots.sum()
            found[name].append(float(np.square(own.mu - other.mu).sum() + trace))
    return found


def _sum_groups(images: ImageSet, member: np.ndarray) -> Iterator[Moments]:
    """Yield the moments of each group, one at a time: groups are ranges of the images, which come in order."""
    start, held = 0, dict[int, Moments]()
    for features, _ in images.read_chunks():
        groups = member[start : start + len(features)]
        start += len(features)
        for group in np.unique(groups):
            part = Moments.from_features(features[groups == group])
            held[group] = held[group] + part if group in held else part
        yield from (held.pop(group) for group in list(held)[:-1])
    yield from held.values()


def recompute_is(images: ImageSet, member: np.ndarray) -> dict[str, list[float]]:
    """Compute the IS again without each group, over new splits of the other images; empty without classes."""
    found: dict[str, list[float]] = {}
    logits = np.concatenate([chunk for _, chunk in images.read_chunks()])
    for group in range(member.max() + 1 if logits.shape[1] else 0):
        others = logits[member != group]
        sums = distances.sum_features([(others[:, :0], others)], len(others))  # of no features
        for name, part in (("is_mean", sums.in_order), ("is_shuffled_mean", sums.shuffled)):
            if part:
                found.setdefault(name, []).append(part.compute_inception_score()[0])
    return found


def recompute_kid(features: np.ndarray, real: np.ndarray, member: np.ndarray) -> Values:
    """Compute the unbiased KID again without each group of (n, d), against all (m, d), less a constant of those."""

    def sum_kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sum((a @ b.T / a.shape[1] + 1) ** 3, dtype=np.float64))

    groups = [features[member == group] for group in range(member.max() + 1)]
    own = np.array([[sum_kernel(a, b) for b in groups] for a in groups])
    cross = np.array([sum(sum_kernel(a, b) for b in np.array_split(real, len(groups))) for a in groups])
    with_itself = np.array([np.sum((np.square(a).mean(axis=1) + 1) ** 3, dtype=np.float64) for a in groups])
    n = len(features) - np.bincount(member)
    pairs = own.sum() - 2 * own.sum(axis=1) + own.diagonal() - with_itself.sum() + with_itself
    found: np.ndarray = pairs / (n * (n - 1)) - 2 * (cross.sum() - cross) / (n * len(real))
    return found


def recompute_precision_recall(
    features: np.ndarray, real: np.ndarray, member: np.ndarray
) -> tuple[Values, Values]:
    """Compute precision and recall of features (n, d) against (m, d) again without each group."""
    x, y, own = torch.from_numpy(features), torch.from_numpy(real), torch.from_numpy(member)
    kept = [own != group for group in range(int(own.max()) + 1)]
    near = [_find_nearest(x, x[~keep]) for keep in kept]  # of each group, (n, NEIGHBOURS + 1)
    others = (torch.cat(near[:group] + near[group + 1 :], dim=1) for group in range(len(kept)))
    radius = [
        its.kthvalue(NEIGHBOURS + 1).values.where(keep, -1) for its, keep in zip(others, kept, strict=True)
    ]
    distances = (torch.cdist(part, x) for part in y.split(BLOCK))
    covered = torch.cat([torch.stack([(d <= r).any(dim=1) for r in radius]) for d in distances], dim=1)
    ball = _find_nearest(y, y)[:, -1]
    inside = torch.cat([(torch.cdist(part, y) <= ball).any(dim=1) for part in x.split(BLOCK)]).double()
    return [float(inside[keep].mean()) for keep in kept], covered.double().mean(dim=1).numpy()


def _find_nearest(a: Tensor, b: Tensor) -> Tensor:
    """Return the distances from each of `a` to the NEIGHBOURS + 1 nearest of `b`, ascending; inf if b has fewer."""
    count = min(NEIGHBOURS + 1, len(b))
    found = [torch.cdist(part, b).topk(count, largest=False).values for part in a.split(BLOCK)]
    return F.pad(torch.cat(found), (0, NEIGHBOURS + 1 - count), value=torch.inf)
