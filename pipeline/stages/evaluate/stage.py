"""What of an evaluation is missing, in which order it is made, and the seal.

A work unit is the features of one tar (`pipeline.scores.image_sets`), or the bound of one range of test
images (`bound`). A unit's result is kept under all that it depends on, so asking for another metric repeats
nothing.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.compute.work import Unit
from pipeline.config import Experiment, to_yaml
from pipeline.errors import PipelineError
from pipeline.scores.image_sets import Shard, content_of, shards_of
from pipeline.scores.preparations import WIDTHS, extractor_of, preparations
from pipeline.scores.reference import brought
from pipeline.stages.evaluate import bound, images
from pipeline.stages.evaluate.protocol import protocol, why_not
from pipeline.store import tars
from pipeline.store.files import read_manifest, write_json, write_manifest, write_text
from pipeline.store.run import Place

log = logging.getLogger(__name__)

METRICS, NLL, CONFIG = "metrics.json", "nll.json", "evaluate.yaml"


def directory(experiment: Experiment, run: Place) -> Path:
    return run.of(experiment).scores


def is_done(experiment: Experiment, run: Place) -> bool:
    """Whether the scores are sealed, and are those of the samples and the weights that are there now."""
    try:
        manifest = read_manifest(directory(experiment, run), check="size")
        if manifest is None:
            return False
        now = _inputs(experiment, run)
    except PipelineError as error:
        log.warning("%s; evaluating again", error)
        return False
    # A checkpoint may be deleted once it is scored; one of other weights is another matter.
    return all(manifest.get(name) == value for name, value in now.items() if value is not None)


def _inputs(experiment: Experiment, run: Place) -> dict[str, str | None]:
    """Hashes of what the scores are of, beside what is in their key; None where it is not there."""
    samples = sample_shards(experiment, run) if needs_samples(experiment) else []
    scores_weights = "nll" in experiment.evaluate.metrics
    weights = bound.CheckpointDenoiser(experiment, run).weights if scores_weights else None
    return {"samples": content_of(samples), "weights": weights}


def needs_samples(experiment: Experiment) -> bool:
    return bool(set(experiment.evaluate.metrics) - {"nll"})


def sample_shards(experiment: Experiment, run: Place) -> list[Shard]:
    """The tars of the first num_images samples. Raises PipelineError where there are fewer."""
    folder = run.of(experiment).samples
    return shards_of(folder, "samples", experiment.sample.num_images)


def check(experiment: Experiment, run: Place) -> None:
    """Raise PipelineError for what the shards alone show to be impossible, before anything is trained."""
    config = experiment.evaluate
    if "nll" in config.metrics:
        bound.nll_images(experiment, run)
    if needs_samples(experiment):
        if "fid_test" in config.metrics or config.reference == "test":
            tars.open_index(run.data).count("test")
        if config.reference_file:
            brought(config.reference_file, WIDTHS[config.features])


def work(experiment: Experiment, run: Place) -> Iterator[list[Unit]]:
    """Yields what features need first, then all else at once; then adds up and seals the scores."""
    check(experiment, run)
    bounds = bound.units(experiment, run) if "nll" in experiment.evaluate.metrics else {}
    pending = [unit for file, unit in bounds.items() if not file.exists()]
    metrics: dict[str, Any] = {"scores": {}, "protocol": protocol(experiment, run)}
    inputs = _inputs(experiment, run)
    if needs_samples(experiment):
        yield preparations(experiment, run)
        extractor = extractor_of(experiment, run)
        sets = images.image_sets(experiment, run, extractor, sample_shards(experiment, run))
        yield pending + sets.missing()
        images.add_scores(metrics, experiment, run, extractor, sets)
    else:
        yield pending
    if bounds:
        nll = bound.merge(bounds, experiment.diffusion.timesteps)
        metrics["scores"] |= nll.pop("scores")
        write_json(directory(experiment, run) / NLL, nll)
    reasons = why_not(metrics["protocol"], experiment.evaluate.metrics)
    metrics["protocol"] |= {"comparable": not reasons, "why_not": reasons}
    _seal(experiment, run, metrics, inputs)


def _seal(experiment: Experiment, run: Place, metrics: dict[str, Any], inputs: dict[str, str | None]) -> None:
    folder = directory(experiment, run)
    write_json(folder / METRICS, metrics)
    write_text(folder / CONFIG, to_yaml(experiment.evaluate))
    names = [METRICS, CONFIG] + ([NLL] if "nll" in experiment.evaluate.metrics else [])
    write_manifest(folder, names, **inputs)
