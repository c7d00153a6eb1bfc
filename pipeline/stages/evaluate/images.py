"""FID, IS, KID, precision and recall of the samples, and of the reference points beside them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compute.work import Unit
from pipeline.config import SPLITS, EvaluateConfig, Experiment
from pipeline.scores.image_sets import ImageSet, Shard, baseline_set, shard_set, shards_of
from pipeline.scores.preparations import pixels_file
from pipeline.scores.reference import Reference
from pipeline.store import tars
from pipeline.store.run import Place

if TYPE_CHECKING:  # importing torch-fidelity takes seconds, and a command that is up to date needs none of it
    from pipeline.scores.distances import Scored, Statistics
    from pipeline.scores.extractors import Extractor


@dataclass(frozen=True)
class ImageSets:
    """All that an evaluation looks at: the samples; the splits of the data whose statistics are not known yet or
    whose single images are compared; the reference points, at no more images than the samples."""

    samples: ImageSet
    splits: dict[str, ImageSet]
    points: dict[str, ImageSet]

    def missing(self) -> list[Unit]:
        """The units whose features are not on disk, each once: a point may be a part of a split."""
        sets = (self.samples, *self.splits.values(), *self.points.values())
        missing = {file: unit for images in sets for file, unit in images.units.items() if not file.exists()}
        return list(missing.values())


@dataclass(frozen=True)
class Real:
    """What the real images give: statistics by the score that is the distance to them, and the features of the
    reference (n, d) where single images are compared."""

    statistics: "dict[str, Statistics]"
    features: np.ndarray | None


def references(config: EvaluateConfig) -> dict[str, str]:
    """Whose statistics each FID is the distance to."""
    all_of_them = {"fid": config.reference, "fid_test": "test"}
    return {score: reference for score, reference in all_of_them.items() if score in config.metrics}


def compares_images(config: EvaluateConfig) -> bool:
    return bool({"kid", "prc"} & set(config.metrics))


def image_sets(experiment: Experiment, run: Place, extractor: "Extractor", samples: list[Shard]) -> ImageSets:
    """The samples; the splits they are compared with; and as points the other split, a Gaussian, noise."""
    config, n = experiment.evaluate, experiment.sample.num_images
    shared = run.data / "references" / "features"

    def split_set(split: str, at_most: int | None = None) -> ImageSet:
        return shard_set(extractor, shards_of(run.data, split, at_most), shared, at_most)

    unknown = {
        split for split in references(config).values() if Reference.of(run, extractor, split).load() is None
    }
    splits = unknown | ({config.reference} if compares_images(config) else set())
    points, index = {}, tars.open_index(run.data)
    other = "train" if config.reference == "test" else "test"
    if other in index.splits:
        points[other] = split_set(other, min(n, index.count(other)))
    shape, pixels = experiment.data.shape, pixels_file(experiment, run)
    if pixels:
        points["gaussian"] = baseline_set(extractor, n, shape, shared, pixels)
    points["noise"] = baseline_set(extractor, n, shape, shared, None)
    drawn = shard_set(extractor, samples, run.score_units, n)
    return ImageSets(drawn, {split: split_set(split) for split in SPLITS if split in splits}, points)


def add_scores(
    metrics: dict[str, Any], experiment: Experiment, run: Place, extractor: "Extractor", sets: ImageSets
) -> None:
    """Scores, reference points, class shares and their part of the protocol, once all features are there."""
    config = experiment.evaluate
    real, scored = _real(config, run, extractor, sets), sets.samples.score()
    metrics["scores"] |= _scores(scored, sets.samples, real, config.metrics)
    to_reference = Real({k: v for k, v in real.statistics.items() if k == "fid"}, real.features)
    metrics["reference_points"] = {
        name: {**_scores(images.score(), images, to_reference, config.metrics), "n": images.n}
        for name, images in sets.points.items()
    }
    if config.features == "classifier" and scored.classes is not None:
        counts = np.bincount(scored.classes, minlength=experiment.data.labels)
        metrics["class_shares"] = (counts / len(scored.classes)).tolist()
        if experiment.sample.label is not None:
            asked = [experiment.asked_label(index) for index in range(len(scored.classes))]
            metrics["scores"]["as_asked"] = float(np.mean(scored.classes == np.array(asked)))
    metrics["protocol"] |= _protocol(config, extractor, scored, real)


def _real(config: EvaluateConfig, run: Place, extractor: "Extractor", sets: ImageSets) -> Real:
    statistics: dict[str, Statistics] = {}
    for score, name in references(config).items():
        reference = Reference.of(run, extractor, name)
        statistics[score] = reference.load() or reference.make(sets.splits[name])
    return Real(statistics, sets.splits[config.reference].features() if compares_images(config) else None)


def _scores(scored: "Scored", images: ImageSet, real: Real, asked: tuple[str, ...]) -> dict[str, float]:
    from pipeline.scores.distances import frechet_distance, kernel_distance, precision_recall

    scores: dict[str, float] = {}
    if real.statistics:
        own = scored.moments.statistics()
        scores |= {name: frechet_distance(own, theirs) for name, theirs in real.statistics.items()}
    if "is" in asked and scored.sums is not None and scored.shuffled is not None:
        scores["is_mean"], scores["is_std"] = scored.sums.inception_score()
        scores["is_shuffled_mean"], scores["is_shuffled_std"] = scored.shuffled.inception_score()
    if real.features is not None:
        features = images.features()
        if "kid" in asked:
            scores["kid_mean"], scores["kid_std"] = kernel_distance(features, real.features)
        if "prc" in asked:
            scores["precision"], scores["recall"] = precision_recall(features, real.features)
    return scores


def _protocol(config: EvaluateConfig, extractor: "Extractor", scored: "Scored", real: Real) -> dict[str, Any]:
    from pipeline.scores.distances import KID_SUBSETS, NEIGHBOURS, SEED, kid_subset_size

    found: dict[str, Any] = {
        "extractor": extractor.name,
        "official_extractor": extractor.is_official,
        "features": len(scored.moments.first),
        "splits": len(scored.sums.n) if scored.sums else None,
    }
    found |= {
        {"fid": "reference_images", "fid_test": "fid_test_images"}[score]: statistics.n
        for score, statistics in real.statistics.items()
    }
    if "is" in config.metrics and scored.sums:
        found["is_shuffle_seed"] = SEED
    if "kid" in config.metrics and real.features is not None:
        size = kid_subset_size(scored.moments.n, len(real.features))
        found["kid"] = f"{KID_SUBSETS} subsets of {size} images, cubic kernel, seed {SEED}"
    if "prc" in config.metrics:
        found["prc"] = f"{NEIGHBOURS} neighbours in the features of {extractor.name}, not of VGG-16"
    return found
