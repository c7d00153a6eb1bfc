"""The evaluate stage: which units are missing, their order, and the seal.

A unit makes the features of one tar (`pipeline.scores.image_sets`), or the bound of some images
(`bound`). A unit's file is named after all that it depends on, so asking for another metric repeats nothing.
"""

import logging
from collections.abc import Iterator

from pipeline.compute.units import Unit
from pipeline.config import Experiment, to_yaml
from pipeline.errors import PipelineError
from pipeline.scores import efficientnet
from pipeline.scores.extractors import EXTRACTORS, find_extractor
from pipeline.scores.image_sets import hash_shards
from pipeline.scores.metrics import Results, needs_samples
from pipeline.scores.preparations import list_preparations
from pipeline.scores.reference import load_user_statistics
from pipeline.stages.evaluate import bound, images
from pipeline.stages.evaluate.protocol import describe_score_protocol, explain_differences
from pipeline.stages.stage import Stage
from pipeline.store import files
from pipeline.store.arrays import is_unit_done
from pipeline.store.run import Place
from pipeline.store.tars import Shard, open_shards

log = logging.getLogger(__name__)


class EvaluateStage(Stage):
    """The stage that scores the samples and computes the bound of the selected checkpoint."""

    name = "evaluate"
    uses_checkpoint = True

    def list_required_stages(self, experiment: Experiment) -> tuple[str, ...]:
        samples = ("sample",) if needs_samples(experiment.evaluate.metrics) else ()
        return ("shard", "train", *samples, *(("select",) if experiment.evaluate.checkpoints else ()))

    def is_done(self, place: Place) -> bool:
        """Return whether the scores are sealed, and belong to the present samples and weights."""
        try:
            if (manifest := files.read_manifest(place.scores, files.Manifest)) is None:
                return False
            files.read_sealed(place.metrics_json, Results)
            inputs = _hash_inputs(place)
        except PipelineError as error:
            log.warning("%s; evaluating again", error)
            return False
        # A checkpoint may be deleted after it is scored, but must not have other weights.
        return all(manifest.get(name) == digest for name, digest in inputs.items() if digest)

    def check_before_start(self, place: Place) -> None:
        config = place.experiment.evaluate
        if needs_samples(config.metrics) and config.features == efficientnet.NAME:
            find_extractor(place)

    def check_before_training(self, place: Place) -> None:
        """Raise PipelineError if the test split is missing or too small, or the user's statistics cannot be used."""
        config = place.experiment.evaluate
        if "nll" in config.metrics:
            bound.count_images(place)
        if needs_samples(config.metrics):
            if "fid_test" in config.metrics or config.reference == "test":
                open_shards(place.data).count_images("test")
            if config.reference_file:
                load_user_statistics(config.reference_file, EXTRACTORS[config.features].width)

    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Yield the units that features need, then all others at once; then write and seal the scores."""
        self.check_before_training(place)
        config, timesteps = place.experiment.evaluate, place.experiment.diffusion.timesteps
        if units := list_preparations(place):
            yield units
        bounds = bound.plan_units(place) if "nll" in config.metrics else {}
        pending = [unit for file, unit in bounds.items() if not is_unit_done(file)]
        found: Results = {"scores": {}, "protocol": describe_score_protocol(place)}
        inputs, written = _hash_inputs(place), [place.metrics_json, place.evaluate_yaml]
        if needs_samples(config.metrics):
            extractor = find_extractor(place)
            sets = images.collect_sets(place, extractor, list_sample_shards(place))
            yield pending + sets.list_missing()
            images.add_scores(found, place, extractor, sets)
        else:
            yield pending
        place.scores_manifest.unlink(missing_ok=True)  # a reader never sees half of both
        if bounds:
            scores, nll = bound.average_bound(bounds, timesteps, config.nll_timesteps)
            # The train split's bound is another score than the test split's, which most readers mean.
            prefix = "train_" if config.nll_split == "train" else ""
            found["scores"] |= {f"{prefix}{name}": value for name, value in scores.items()}
            files.write_json(place.nll_json, nll)
            written.append(place.nll_json)
        reasons = explain_differences(found["protocol"], config.metrics)
        found["protocol"] |= {"comparable": not reasons, "why_not": reasons}
        files.write_json(place.metrics_json, found)
        files.write_text(place.evaluate_yaml, to_yaml(config))
        files.write_manifest(place.scores, [file.name for file in written], **inputs)


STAGE = EvaluateStage()


def list_sample_shards(place: Place) -> list[Shard]:
    """List the tars of the first num_images samples. Raises PipelineError if there are fewer."""
    return open_shards(place.samples).list_shards("samples", place.experiment.sample.num_images)


def _hash_inputs(place: Place) -> dict[str, str | None]:
    """Return the hashes of samples and weights, which are not in the scores' key; None if one is not there."""
    samples = list_sample_shards(place) if needs_samples(place.experiment.evaluate.metrics) else []
    weights = bound.hash_weights(place) if "nll" in place.experiment.evaluate.metrics else None
    return {"samples": hash_shards(samples), "weights": weights}
