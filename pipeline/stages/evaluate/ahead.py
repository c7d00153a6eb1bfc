"""Features of samples that are drawn already, while others are still being drawn."""

from collections.abc import Callable
from pathlib import Path

from pipeline.compute.work import Unit
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.scores.image_sets import Shard, shard_set
from pipeline.scores.preparations import extractor_of, is_prepared
from pipeline.store.files import read_json
from pipeline.store.run import Place


def ahead(experiment: Experiment, run: Place) -> Callable[[Unit], list[Unit]]:
    """What can be done once a unit of samples is: the unit of its features, if they will be scored and their
    extractor is there. Where it is not, the evaluate stage makes it, or says why it cannot."""
    if set(experiment.evaluate.metrics) <= {"nll"} or not is_prepared(experiment, run):
        return lambda unit: []
    try:
        extractor = extractor_of(experiment, run)
    except PipelineError:
        return lambda unit: []

    def features_of(unit: Unit) -> list[Unit]:
        if unit.tar is None:
            return []
        shard = _drawn(unit.tar, experiment.data.shape)
        return shard_set(extractor, [shard], run.score_units).missing()

    return features_of


def _drawn(tar: Path, shape: tuple[int, int, int]) -> Shard:
    """The tar as the facts beside it say, before there is a manifest."""
    facts = read_json(tar.with_suffix(".json"))
    return Shard(tar.parent, "samples", tar.name, facts["start"], facts["count"], facts["sha256"], shape)
