"""Units that must be done before features are computed: the classifier, and the Gaussian of the training pixels.

Both belong to the data and are shared by the runs on them.
"""

from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline.compute.units import Unit, UnitKind, Worker
from pipeline.errors import PipelineError
from pipeline.scores import baselines, classifier
from pipeline.scores.image_sets import hash_shards
from pipeline.store import tars
from pipeline.store.files import (
    hash_file,
    is_unit_done,
    read_arrays,
    read_record,
    write_arrays,
    write_atomically,
    write_json,
)
from pipeline.store.run import Place

LARGEST_GAUSSIAN = 4096  # dimensions; the covariance of larger images would fill the memory


def list_preparations(place: Place) -> list[Unit]:
    """List the units of the classifier and of the Gaussian that are not done."""
    count, units = tars.open_shards(place.data).count_images("train"), []
    if place.experiment.evaluate.features == "classifier":
        weights, facts = place.classifier, place.classifier_json
        if not weights.exists() or read_record(facts, dict[str, Any]).get("sha256") != hash_file(weights):
            units.append(Unit(UnitKind.PREPARATION, train_classifier, (place,), "the classifier", count))
    pixels = locate_gaussian(place)
    if pixels and not is_unit_done(pixels, read_arrays):
        name = "the Gaussian of the training pixels"
        units.append(Unit(UnitKind.PREPARATION, write_gaussian, (place, pixels), name, count))
    return units


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
    with write_atomically(place.classifier) as temporary:
        save_file(net.state_dict(), temporary)
    has_test = "test" in tars.open_shards(place.data).splits
    accuracy = classifier.measure_accuracy(net, *tars.load_images(place.data, "test")) if has_test else None
    facts = {"sha256": hash_file(place.classifier), "test_accuracy": accuracy, "steps": classifier.STEPS}
    write_json(place.classifier_json, facts)


def locate_gaussian(place: Place) -> Path | None:
    """Return where the Gaussian is kept; None if the images are too large for one."""
    if prod(place.experiment.data.shape) > LARGEST_GAUSSIAN:
        return None
    return place.references / f"gaussian-{hash_shards(tars.open_shards(place.data).list_shards('train'))}.npz"


def write_gaussian(ctx: Worker, place: Place, file: Path) -> None:
    """Write mean and covariance of the training pixels (body of a unit)."""
    shards = tars.open_shards(place.data).list_shards("train")
    parts = (tars.load_images(place.data, "train", shard.start, shard.stop)[0] for shard in shards)
    mean, factor = baselines.fit_gaussian(parts)
    write_arrays(file, mean=mean, factor=factor)
