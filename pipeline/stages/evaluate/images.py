"""FID, IS, KID, precision and recall of the samples, and of the baselines: the other split, a Gaussian, noise."""

from dataclasses import dataclass

import numpy as np

from pipeline.compute.units import Unit
from pipeline.config.checks import Tree
from pipeline.config.sections import NEED_IMAGES
from pipeline.console import print_line
from pipeline.scores import distances, inception, jackknife
from pipeline.scores.distances import Reference
from pipeline.scores.extractors import Extractor
from pipeline.scores.image_sets import ImageSet, make_baseline_set, make_shard_set
from pipeline.scores.metrics import METRICS, Results, Scores, add_error
from pipeline.scores.preparations import has_covariance, locate_factor
from pipeline.scores.reference import load_reference, write_split_statistics
from pipeline.store import tars
from pipeline.store.arrays import is_unit_done
from pipeline.store.files import read_record
from pipeline.store.run import Place

MANY = 5000  # real images from which on comparing each takes minutes


@dataclass(frozen=True)
class EvaluationSets:
    """The image sets of an evaluation; references: the split or the file to which each FID is the distance.

    splits: those whose statistics are still to be made, or whose single images KID, precision and recall compare.
    baselines: of no more images than the samples; if there are fewer real images, as many samples are a baseline too.
    """

    references: dict[str, str]
    compares_images: bool
    samples: ImageSet
    splits: dict[str, ImageSet]
    baselines: dict[str, ImageSet]

    def list_missing(self) -> list[Unit]:
        """List the units whose features are not on disk, each once, since a baseline may be a part of a split."""
        sets = (self.samples, *self.splits.values(), *self.baselines.values())
        units = {file: unit for images in sets for file, unit in images.units.items()}
        return [unit for file, unit in units.items() if not is_unit_done(file)]


def collect_sets(place: Place, extractor: Extractor, samples: list[tars.Shard]) -> EvaluationSets:
    """Collect the image sets: samples, the splits that they are compared with, and baselines."""
    experiment, config = place.experiment, place.experiment.evaluate
    n, shape = experiment.sample.num_images, experiment.data.shape
    folder, index = place.reference_features, tars.open_shards(place.data)

    def make_split_set(split: str, at_most: int | None = None) -> ImageSet:
        return make_shard_set(extractor, index.list_shards(split, at_most), shape, folder, at_most)

    every = {"fid": config.reference, "fid_test": "test"}
    references = {score: name for score, name in every.items() if score in config.metrics}
    splits = {name for name in references.values() if load_reference(place, extractor, name) is None}
    if compares_images := bool(set(NEED_IMAGES) & set(config.metrics)):
        splits.add(config.reference)
    baselines = {}
    other = "train" if config.reference == "test" else "test"
    own = make_shard_set(extractor, samples, shape, place.score_units, n)
    if other in index.splits:
        baselines[other] = make_split_set(other, min(n, index.count_images(other)))
        if (fewer := baselines[other].n) < n:
            baselines["samples"] = ImageSet(fewer, own.units)
    if has_covariance(place):
        baselines["gaussian"] = make_baseline_set(extractor, n, shape, folder, locate_factor(place))
    baselines["noise"] = make_baseline_set(extractor, n, shape, folder, None)
    found = {split: make_split_set(split) for split in sorted(splits)}
    return EvaluationSets(references, compares_images, own, found, baselines)


def add_scores(found: Results, place: Place, extractor: Extractor, sets: EvaluationSets) -> None:
    """Add the scores of samples and baselines, and their protocol, to the results; all features must be there."""
    experiment, config = place.experiment, place.experiment.evaluate
    statistics = {
        score: load_reference(place, extractor, name)
        or write_split_statistics(place, extractor, name, sets.splits[name])
        for score, name in sets.references.items()
    }
    real = sets.splits[config.reference].read_features() if sets.compares_images else None
    if real is not None and len(real) > MANY:
        print_line(
            f"evaluate: comparing {len(sets.baselines) + 1} sets with {len(real):,} images takes minutes"
        )
    # KID grows with the sixth power of the features' size; Inception's stays as published.
    rms = 1.0
    if real is not None and extractor.kind != inception.NAME:
        rms = float(np.sqrt(np.square(real, dtype=np.float64).mean())) or 1.0
    target, groups = Reference(statistics, real, rms), min(jackknife.MOST_GROUPS, len(sets.samples.units))
    sums = sets.samples.sum_features()
    found["protocol"] |= _describe_features(extractor, sums, target, config.metrics)
    found["protocol"]["jackknife_groups"] = groups
    if config.features == "classifier":
        accuracy = read_record(place.classifier_json, Tree).get("test_accuracy")
        found["protocol"]["classifier_accuracy"] = accuracy
    found["scores"] |= _compute_scores(sets.samples, sums, target, config.metrics, groups)
    statistics.pop("fid_test", None)  # baselines are compared with the reference alone
    found["reference_points"] = points = dict[str, Scores]()
    for name, images in sets.baselines.items():
        scores = _compute_scores(images, images.sum_features(), target, config.metrics, groups)
        points[name] = {**scores, "n": images.n}
    if config.features == "classifier" and sums.classes is not None:
        counts = np.bincount(sums.classes, minlength=experiment.data.labels)
        found["class_shares"] = (counts / len(sums.classes)).tolist()
        if (label := experiment.sample.label) is not None:
            cycle = np.arange(len(sums.classes)) % experiment.data.labels
            right = sums.classes == (cycle if label == "cycle" else label)
            found["scores"]["as_asked"] = float(right.mean())
            add_error(found["scores"], "as_asked", float(right.std() / len(right) ** 0.5))


def _compute_scores(
    images: ImageSet, sums: distances.FeatureSums, target: Reference, metrics: tuple[str, ...], groups: int
) -> Scores:
    """Return {score: value} of a set, with the errors, or with the reason why there are none."""
    scores: Scores = {}
    if target.statistics:
        own = sums.moments.to_statistics()
        scores |= {name: distances.compute_fid(own, other) for name, other in target.statistics.items()}
    if "is" in metrics and sums.in_order and sums.shuffled:
        scores["is_mean"], scores["is_std"] = sums.in_order.compute_inception_score()
        scores["is_shuffled_mean"], scores["is_shuffled_std"] = sums.shuffled.compute_inception_score()
    if target.real is not None:
        features = images.read_features()
        if "kid" in metrics:
            pair = features / target.rms, target.real / target.rms
            scores["kid_mean"], scores["kid_std"] = distances.compute_kid(*pair)
        if "prc" in metrics:
            scores["precision"], scores["recall"] = distances.compute_precision_recall(features, target.real)
    reason = ""
    if groups < 2:
        reason = "the samples are a single unit, and an error needs two"
    elif images.n < jackknife.LEAST_IMAGES:
        reason = f"{images.n} images are fewer than {jackknife.LEAST_IMAGES}"
    errors = {} if reason else jackknife.compute_errors(images, groups, sums.moments, target, scores)
    for name in [name for name, metric in METRICS.items() if name in scores and metric.has_error]:
        add_error(scores, name, errors.get(name), reason or "the jackknife does not know this score")
    return scores


def _describe_features(
    extractor: Extractor, sums: distances.FeatureSums, target: Reference, metrics: tuple[str, ...]
) -> Tree:
    """Return the protocol's entries on the features: extractor, counts, reference."""
    statistics, real = target.statistics, target.real
    found: Tree = {
        "extractor": extractor.name, "official_extractor": extractor.is_published,
        "features": len(sums.moments.first), "splits": len(sums.in_order.n) if sums.in_order else None,
    }  # fmt: skip
    if "fid" in statistics:
        found["reference_images"] = statistics["fid"].n
    if "fid_test" in statistics:
        found["fid_test_images"] = statistics["fid_test"].n
    if "is" in metrics and sums.in_order:
        found["is_shuffle_seed"] = distances.SEED
    if "kid" in metrics and real is not None:
        subsets, size = distances.KID_SUBSETS, distances.choose_kid_subset_size(sums.moments.n, len(real))
        scaled = "" if target.rms == 1 else ", features over their RMS in the reference"
        found["kid"] = f"{subsets} subsets of {size} images, cubic kernel, seed {distances.SEED}{scaled}"
    if "prc" in metrics:
        found["prc"] = f"{distances.NEIGHBOURS} neighbours in the features of {extractor.name}, not of VGG-16"
    return found
