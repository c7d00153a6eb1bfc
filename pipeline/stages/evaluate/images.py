"""FID, IS, KID, precision and recall of the samples, and of the reference points beside them."""

from dataclasses import dataclass

import numpy as np

from pipeline.compute.units import Unit
from pipeline.config import EvaluateConfig
from pipeline.scores import distances
from pipeline.scores.extractors import Extractor
from pipeline.scores.image_sets import ImageSet, baseline_set, shard_set
from pipeline.scores.preparations import gaussian_file
from pipeline.scores.reference import Reference
from pipeline.scores.results import Results, ScoreProtocol, Scores
from pipeline.store import tars
from pipeline.store.run import Place


@dataclass(frozen=True)
class ImageSets:
    """All that an evaluation looks at: the samples; the splits of the data whose statistics are not known yet or
    whose single images are compared; the reference points, at no more images than the samples."""

    samples: ImageSet
    splits: dict[str, ImageSet]
    points: dict[str, ImageSet]

    def missing(self) -> list[Unit]:
        """List the units whose features are not on disk, each once: a point may be a part of a split."""
        sets = (self.samples, *self.splits.values(), *self.points.values())
        return list(dict.fromkeys(unit for images in sets for unit in images.missing()))


def list_references(config: EvaluateConfig) -> dict[str, str]:
    """List whose statistics each FID is the distance to."""
    every = {"fid": config.reference, "fid_test": "test"}
    return {score: reference for score, reference in every.items() if score in config.metrics}


def compares_images(config: EvaluateConfig) -> bool:
    return bool({"kid", "prc"} & set(config.metrics))


def collect_sets(place: Place, extractor: Extractor, samples: list[tars.Shard]) -> ImageSets:
    """Collect the samples; the splits they are compared with; and as points the other split, a Gaussian, noise."""
    experiment, config = place.experiment, place.experiment.evaluate
    n, shape = experiment.sample.num_images, experiment.data.shape
    folder, index = place.reference_features, tars.open_shards(place.data)

    def split_set(split: str, at_most: int | None = None) -> ImageSet:
        return shard_set(extractor, index.list_shards(split, at_most), shape, folder, at_most)

    splits = {config.reference} if compares_images(config) else set()
    for split in list_references(config).values():
        if Reference.of(place, extractor, split).load() is None:
            splits.add(split)
    points = {}
    other = "train" if config.reference == "test" else "test"
    if other in index.splits:
        points[other] = split_set(other, min(n, index.count_images(other)))
    if pixels := gaussian_file(place):
        points["gaussian"] = baseline_set(extractor, n, shape, folder, pixels)
    points["noise"] = baseline_set(extractor, n, shape, folder, None)
    own = shard_set(extractor, samples, shape, place.score_units, n)
    return ImageSets(own, {split: split_set(split) for split in sorted(splits)}, points)


def add_scores(found: Results, place: Place, extractor: Extractor, sets: ImageSets) -> None:
    """Add scores, reference points, class shares and their part of the protocol, once all features are there."""
    experiment, config = place.experiment, place.experiment.evaluate
    statistics = {}
    for score, name in list_references(config).items():
        reference = Reference.of(place, extractor, name)
        statistics[score] = reference.load() or reference.make(sets.splits[name])
    real = sets.splits[config.reference].features() if compares_images(config) else None
    scored = sets.samples.sum_features()
    found["protocol"] |= _describe(config, extractor, scored, statistics, real)
    found["scores"] |= _compare(sets.samples, scored, statistics, real, config.metrics)
    statistics.pop("fid_test", None)  # reference points are compared with the reference alone
    found["reference_points"] = {
        name: {**_compare(images, images.sum_features(), statistics, real, config.metrics), "n": images.n}
        for name, images in sets.points.items()
    }
    if config.features == "classifier" and scored.classes is not None:
        counts = np.bincount(scored.classes, minlength=experiment.data.labels)
        found["class_shares"] = (counts / len(scored.classes)).tolist()
        if experiment.sample.label is not None:
            asked = [experiment.choose_label(index) for index in range(len(scored.classes))]
            found["scores"]["as_asked"] = float(np.mean(scored.classes == np.array(asked)))


def _compare(
    images: ImageSet, scored: distances.FeatureSums, statistics: dict[str, distances.Statistics],
    real: np.ndarray | None, asked: tuple[str, ...],
) -> Scores:  # fmt: skip
    """Compute the scores of a set: against `statistics`, by the name of the score, and real features (n, d)."""
    scores: Scores = {}
    if statistics:
        own = scored.moments.statistics()
        scores |= {name: distances.frechet_distance(own, its) for name, its in statistics.items()}
    if "is" in asked and scored.sums and scored.shuffled:
        scores["is_mean"], scores["is_std"] = scored.sums.inception_score()
        scores["is_shuffled_mean"], scores["is_shuffled_std"] = scored.shuffled.inception_score()
    if real is not None:
        features = images.features()
        if "kid" in asked:
            scores["kid_mean"], scores["kid_std"] = distances.kernel_distance(features, real)
        if "prc" in asked:
            scores["precision"], scores["recall"] = distances.precision_recall(features, real)
    return scores


def _describe(
    config: EvaluateConfig, extractor: Extractor, scored: distances.FeatureSums,
    statistics: dict[str, distances.Statistics], real: np.ndarray | None,
) -> ScoreProtocol:  # fmt: skip
    found: ScoreProtocol = {
        "extractor": extractor.name,
        "official_extractor": extractor.is_official,
        "features": len(scored.moments.first),
        "splits": len(scored.sums.n) if scored.sums else None,
    }
    if "fid" in statistics:
        found["reference_images"] = statistics["fid"].n
    if "fid_test" in statistics:
        found["fid_test_images"] = statistics["fid_test"].n
    if "is" in config.metrics and scored.sums:
        found["is_shuffle_seed"] = distances.SEED
    if "kid" in config.metrics and real is not None:
        subsets = f"{distances.KID_SUBSETS} subsets of {distances.kid_subset_size(scored.moments.n, len(real))} images"
        found["kid"] = f"{subsets}, cubic kernel, seed {distances.SEED}"
    if "prc" in config.metrics:
        neighbours = f"{distances.NEIGHBOURS} neighbours in the features of {extractor.name}"
        found["prc"] = f"{neighbours}, not of VGG-16"
    return found
