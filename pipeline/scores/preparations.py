"""What has to be there before features are made: an extractor's weights, the Gaussian of the training pixels.

All of it belongs to the data and is shared by the runs on them.
"""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.compute.work import Kind, Unit, WorkerContext
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.scores import classifier, projection
from pipeline.scores.image_sets import content_of, shards_of
from pipeline.store import tars
from pipeline.store.files import atomic_file, read_json, sha256_of, write_arrays, write_json
from pipeline.store.run import Place

if TYPE_CHECKING:
    from pipeline.scores.extractors import Extractor

WIDTHS = {
    "inception-v3-compat": 2048,
    "classifier": classifier.FEATURES,
    "projection": projection.FEATURES,
}
LARGEST_GAUSSIAN = 4096  # dimensions; the covariance of larger images would fill the memory


def preparations(experiment: Experiment, run: Place) -> list[Unit]:
    """The units that are still missing."""
    found = tars.open_index(run.data).count("train")
    units = []
    if not is_prepared(experiment, run):
        args = (run, experiment.data.labels)
        units.append(Unit(Kind.PREPARATION, train_classifier, args, "the classifier", found))
    pixels = pixels_file(experiment, run)
    if pixels and not pixels.exists():
        name = "the Gaussian of the training pixels"
        units.append(Unit(Kind.PREPARATION, fit_gaussian, (run, pixels), name, found))
    return units


def is_prepared(experiment: Experiment, run: Place) -> bool:
    """Whether the extractor needs no unit of work any more."""
    return experiment.evaluate.features != "classifier" or _is_trained(run)


def extractor_of(experiment: Experiment, run: Place) -> "Extractor":
    """The extractor that evaluate.features names; the classifier is trained by then."""
    from pipeline.scores import extractors

    config = experiment.evaluate
    if config.features == "classifier":
        return extractors.classifier_extractor(classifier_files(run)[0])
    if config.features == "projection":
        path = run.data / "projection" / "projection.safetensors"
        return extractors.projection_extractor(path, experiment.data.channels)
    return extractors.inception_extractor(config.extractor_weights, run.storage / "extractors")


def classifier_files(run: Place) -> tuple[Path, Path]:
    """The weights, and the json that is written after them with their hash and test accuracy."""
    return run.data / "classifier" / "classifier.safetensors", run.data / "classifier" / "classifier.json"


def _is_trained(run: Place) -> bool:
    weights, facts = classifier_files(run)
    return facts.exists() and weights.exists() and read_json(facts)["sha256"] == sha256_of(weights)


def train_classifier(ctx: WorkerContext, run: Place, classes: int) -> None:
    """The work unit: on the CPU whatever the device."""
    images, labels = tars.load_images(run.data, "train")
    if labels.min() < 0 or labels.max() >= classes:
        raise PipelineError(
            f"{run.data} has labels {labels.min()}..{labels.max()} (-1 = none) where data.labels={classes} allows "
            f"0..{classes - 1}; correct it, or use evaluate.features=projection"
        )
    net = classifier.train(images, labels, classes)
    weights, facts = classifier_files(run)
    with atomic_file(weights) as temporary:
        classifier.save(net, temporary)
    has_test = "test" in tars.open_index(run.data).splits
    accuracy = classifier.accuracy(net, *tars.load_images(run.data, "test")) if has_test else None
    write_json(facts, {"sha256": sha256_of(weights), "test_accuracy": accuracy, "steps": classifier.STEPS})


def pixels_file(experiment: Experiment, run: Place) -> Path | None:
    """Where the Gaussian is kept; None for images that are too large for one."""
    if prod(experiment.data.shape) > LARGEST_GAUSSIAN:
        return None
    return run.data / "references" / f"gaussian-{content_of(shards_of(run.data, 'train'))}.npz"


def fit_gaussian(ctx: WorkerContext, run: Place, file: Path) -> None:
    """The work unit: mean and covariance of the training pixels."""
    from pipeline.scores.baselines import pixel_gaussian

    shards = shards_of(run.data, "train")
    mean, factor = pixel_gaussian(tars.iterate_shard_images(s.folder, s.split, s.name)[0] for s in shards)
    write_arrays(file, mean=mean, factor=factor)
