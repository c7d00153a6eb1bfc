"""What of an evaluation is missing, in which order it is made, and the seal.

A work unit is the features of one tar (`pipeline.scores.image_sets`), or the bound of one range of test images
(`bound`). A unit's result is kept under all that it depends on, so asking for another metric repeats nothing.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.compute.work import Unit
from pipeline.config import Experiment, to_yaml
from pipeline.errors import PipelineError
from pipeline.scores.extractors import EXTRACTORS, find_extractor
from pipeline.scores.image_sets import Shard, hash_shards, list_shards, shard_set
from pipeline.scores.preparations import has_extractor, missing_preparations
from pipeline.scores.reference import load_statistics
from pipeline.scores.results import Results
from pipeline.stages.evaluate import bound, images
from pipeline.stages.evaluate.protocol import describe_protocol, explain_differences
from pipeline.store import tars
from pipeline.store.files import read_json, read_manifest, write_json, write_manifest, write_text
from pipeline.store.run import Place

log = logging.getLogger(__name__)


def directory(experiment: Experiment, run: Place) -> Path:
    return run.of(experiment).scores


def needs_samples(experiment: Experiment) -> bool:
    return bool(set(experiment.evaluate.metrics) - {"nll"})


def is_done(experiment: Experiment, run: Place) -> bool:
    """Whether the scores are sealed, and are those of the samples and the weights that are there now."""
    place = run.of(experiment)
    try:
        manifest = read_manifest(place.scores, check="size")
        inputs = _hash_inputs(place) if manifest else {}
    except PipelineError as error:
        log.warning("%s; evaluating again", error)
        return False
    # A checkpoint may be deleted once it is scored; one of other weights is another matter.
    return manifest is not None and all(manifest.get(name) == its for name, its in inputs.items() if its)


def _hash_inputs(place: Place) -> dict[str, str | None]:
    """Hash what the scores are of, beside what is in their key; None where it is not there."""
    samples = list_samples(place) if needs_samples(place.experiment) else []
    scores_weights = "nll" in place.experiment.evaluate.metrics
    weights = bound.CheckpointDenoiser(place).weights if scores_weights else None
    return {"samples": hash_shards(samples), "weights": weights}


def list_samples(place: Place) -> list[Shard]:
    """List the tars of the first num_images samples. Raises PipelineError where there are fewer."""
    return list_shards(place.samples, "samples", place.experiment.sample.num_images)


def check(experiment: Experiment, run: Place) -> None:
    """Raise PipelineError for what the shards alone show to be impossible, before anything is trained."""
    config = experiment.evaluate
    if "nll" in config.metrics:
        bound.count_images(run.of(experiment))
    if needs_samples(experiment):
        if "fid_test" in config.metrics or config.reference == "test":
            tars.open_index(run.data).count("test")
        if config.reference_file:
            load_statistics(config.reference_file, EXTRACTORS[config.features].width)


def work(experiment: Experiment, run: Place) -> Iterator[list[Unit]]:
    """Yield what features need first, then all else at once; then add up and seal the scores."""
    place = run.of(experiment)
    check(experiment, place)
    bounds = bound.units(place) if "nll" in experiment.evaluate.metrics else {}
    pending = [unit for file, unit in bounds.items() if not file.exists()]
    found: Results = {"scores": {}, "protocol": describe_protocol(place)}
    inputs, names = _hash_inputs(place), [place.metrics_json.name, place.evaluate_yaml.name]
    if needs_samples(experiment):
        yield missing_preparations(place)
        extractor = find_extractor(place)
        sets = images.collect_sets(place, extractor, list_samples(place))
        yield pending + sets.missing()
        images.add_scores(found, place, extractor, sets)
    else:
        yield pending
    if bounds:
        scores, nll = bound.merge(bounds, experiment.diffusion.timesteps)
        found["scores"] |= scores
        write_json(place.nll_json, nll)
        names.append(place.nll_json.name)
    reasons = explain_differences(found["protocol"], experiment.evaluate.metrics)
    found["protocol"] |= {"comparable": not reasons, "why_not": reasons}
    write_json(place.metrics_json, found)
    write_text(place.evaluate_yaml, to_yaml(experiment.evaluate))
    write_manifest(place.scores, names, **inputs)


def follow_samples(experiment: Experiment, run: Place) -> Callable[[Unit], list[Unit]]:
    """Return what can be done once a unit of samples is: the unit of its features, if they will be scored and their
    extractor is there. Where it is not, the stage makes it, or says why it cannot."""
    place = run.of(experiment)
    if not needs_samples(experiment) or not has_extractor(place):
        return lambda unit: []
    try:
        extractor = find_extractor(place)
    except PipelineError:
        return lambda unit: []

    def list_features(unit: Unit) -> list[Unit]:
        if unit.tar is None:
            return []
        facts = read_json(unit.tar.with_suffix(".json"))  # there is no manifest yet
        where = (unit.tar.parent, "samples", unit.tar.name)
        shard = Shard(*where, facts["start"], facts["count"], facts["sha256"], experiment.data.shape)
        return shard_set(extractor, [shard], place.score_units).missing()

    return list_features
