"""Units that are done before any score: the classifier, and the Gaussian of the training pixels.

Both belong to the data and are shared by the runs on them.
"""

from collections.abc import Iterable
from functools import reduce
from math import prod
from operator import add
from pathlib import Path

import numpy as np
import torch

from ddpm.denoisers import make_linear_denoiser
from ddpm.diffusion import Diffusion, Network
from pipeline.compute.units import Unit, UnitKind, Worker
from pipeline.config.checks import Tree
from pipeline.errors import PipelineError
from pipeline.scores import classifier
from pipeline.scores.distances import Moments
from pipeline.scores.image_sets import hash_shards
from pipeline.scores.metrics import needs_samples
from pipeline.store import files, tars
from pipeline.store.arrays import is_unit_done, read_arrays, write_arrays
from pipeline.store.run import Place
from pipeline.store.tensors import save_tensors

LARGEST_GAUSSIAN = 4096  # dimensions; the covariance of larger images would fill the memory
GRAM = 2**25  # values, or 2,000 images, from which to compute the principal directions of such images


def list_preparations(place: Place) -> list[Unit]:
    """List the units of the classifier and of the Gaussian that the configuration needs and that are not done."""
    count, units = tars.open_shards(place.data).count_images("train"), []
    config = place.experiment.evaluate
    scores_samples = needs_samples(config.metrics)
    if scores_samples and config.features == "classifier":
        weights, facts = place.classifier, place.classifier_json
        known = files.read_record(facts, Tree).get("sha256")
        if not weights.is_file() or known != files.hash_file(weights):
            units.append(Unit(UnitKind.PREPARATION, train_classifier, (place,), "the classifier", count))
    if (scores_samples and has_covariance(place)) or ("nll" in config.metrics and config.nll_timesteps):
        units += list_gaussian_units(place)
    return units


def list_gaussian_units(place: Place) -> list[Unit]:
    count, file = tars.open_shards(place.data).count_images("train"), locate_factor(place)
    unit = Unit(UnitKind.PREPARATION, write_gaussian, (place, file), "the Gaussian of the pixels", count)
    return [] if is_unit_done(file, read_arrays) else [unit]


def train_classifier(ctx: Worker, place: Place) -> None:
    """Train the classifier and write it (body of a unit), always on the CPU. Its facts are written last."""
    classes = place.experiment.data.labels
    images, labels = tars.load_images(place.data, "train")
    if labels.min() < 0 or labels.max() >= classes:
        raise PipelineError(
            f"{place.data} has labels {labels.min()}..{labels.max()} (-1 = none) where data.labels={classes} allows "
            f"0..{classes - 1}; correct it, or use evaluate.features=projection"
        )
    net = classifier.fit_classifier(images, labels, classes)
    with files.write_atomically(place.classifier) as temporary:
        save_tensors(net.state_dict(), temporary)
    has_test = "test" in tars.open_shards(place.data).splits
    accuracy = classifier.measure_accuracy(net, *tars.load_images(place.data, "test")) if has_test else None
    sha256 = files.hash_file(place.classifier)
    facts = {"sha256": sha256, "test_accuracy": accuracy, "steps": classifier.STEPS}
    files.write_json(place.classifier_json, facts)


def locate_factor(place: Place) -> Path:
    """Return the file of mean (d,) and factor (d, r), covariance = factor factor^T, on the scale 0 to 255.

    Of images too large for a covariance it holds some directions only, and the variance of each other one.
    """
    kind, shards = "gaussian" if has_covariance(place) else "gram", tars.open_shards(place.data)
    return place.references / f"{kind}-{hash_shards(shards.list_shards('train'))}.npz"


def has_covariance(place: Place) -> bool:
    """Return whether the images are small enough for a covariance, and so for a Gaussian to draw from."""
    return prod(place.experiment.data.shape) <= LARGEST_GAUSSIAN


def _count_fitted_images(place: Place) -> int:
    n, d = tars.open_shards(place.data).count_images("train"), prod(place.experiment.data.shape)
    return n if has_covariance(place) else min(n, 2000, max(2, GRAM // d))


def write_gaussian(ctx: Worker, place: Place, file: Path) -> None:
    n, rest = _count_fitted_images(place), 0.0
    if n == 1:
        mean = tars.load_images(place.data, "train")[0].reshape(-1).astype(np.float64)
        factor = np.zeros((len(mean), min(len(mean), LARGEST_GAUSSIAN)))
    elif has_covariance(place):
        shards = tars.open_shards(place.data).list_shards("train")
        parts = (tars.load_images(place.data, "train", shard.start, shard.stop)[0] for shard in shards)
        mean, factor = fit_gaussian(parts)
    else:
        images = tars.load_images(place.data, "train", 0, n)[0]
        mean, factor, rest = fit_principal_directions(images)
    write_arrays(file, mean=mean, factor=factor, rest=np.array(rest))


def fit_gaussian(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Fit a Gaussian to uint8 images (n,C,H,W) in parts: mean (d,) and factor (d, d), covariance = factor factor^T."""
    moments = reduce(add, (Moments.from_features(images.reshape(len(images), -1)) for images in parts))
    statistics = moments.to_statistics()
    return statistics.mu, statistics.factor_covariance()


def fit_principal_directions(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return mean (d,), factor (d, r) and the variance of each other direction, of images too large for a covariance.

    The first half of the uint8 images (n,C,H,W), n >= 2, gives the directions, by its Gram matrix, and the second half
    the variances: along directions that were computed from a set, it varies more than other images do.
    """
    pixels = images.reshape(len(images), -1).astype(np.float64)
    mean = pixels.mean(axis=0)
    first, second = np.array_split(pixels - mean, 2)
    directions = np.linalg.svd(first, full_matrices=False)[2].T
    variances = ((second @ directions) ** 2).mean(axis=0)
    rest = ((second**2).sum(axis=1).mean() - variances.sum()) / max(1, len(mean) - len(variances))
    return mean, directions * np.sqrt(variances), float(rest.clip(min=0))


def load_variances(place: Place) -> tuple[torch.Tensor, str]:
    """Load the variances (d,) of the training images, in [-1, 1] and divided by n, and a description of them.

    Directions that are not on file, or without variance, come last.
    """
    arrays, n = read_arrays(locate_factor(place)), _count_fitted_images(place)
    factor, exact = arrays["factor"], has_covariance(place)
    found = (factor**2).sum(axis=0) * ((n - 1) / n if exact else 1)
    others = np.full(len(factor) - np.count_nonzero(found), arrays.get("rest", 0.0))
    variances = np.concatenate([found[found > 0], others])
    source = f"the {'covariance of all' if exact else 'Gram matrix of'} {n:,} training images"
    return torch.from_numpy(variances / 127.5**2), source


def load_linear_denoiser(
    place: Place, diffusion: Diffusion, device: torch.device
) -> tuple[Network, torch.Tensor]:
    """Load the best linear denoiser of the training images, float32, and their mean (d,) in [-1, 1]."""
    arrays = read_arrays(locate_factor(place))
    norms = np.linalg.norm(arrays["factor"], axis=0)
    directions = torch.from_numpy(arrays["factor"][:, norms > 0] / norms[norms > 0])
    parts = torch.from_numpy(arrays["mean"] / 127.5 - 1), directions, load_variances(place)[0]
    mean, directions, variances = (part.float().to(device) for part in parts)
    return make_linear_denoiser(diffusion, mean, directions, variances), mean
