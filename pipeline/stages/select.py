"""The select stage: samples and scores every candidate like a separate run, and selects the best.

The candidates' samples and scores are in the usual folders, so that nothing is scored twice. The
selected one is scored on other samples, since the minimum of noisy scores is biased.
"""

import logging
from collections.abc import Iterator

from pipeline.compute.units import Unit
from pipeline.config import Experiment
from pipeline.stages.stage import Stage
from pipeline.store import selection
from pipeline.store.checkpoint import raise_no_checkpoint
from pipeline.store.run import Place

log = logging.getLogger(__name__)


class SelectStage(Stage):
    """Selects the best of the checkpoints that evaluate.checkpoints names."""

    name = "select"
    selects_checkpoint = adds_to_run = True

    def list_required_stages(self, experiment: Experiment) -> tuple[str, ...]:
        return ("shard", "train")

    def is_done(self, place: Place) -> bool:
        """Return whether training has ended and the selection includes every candidate."""
        return place.locate_step(place.experiment.train.steps).is_dir() and selection.is_done(place)

    def list_inputs(self, place: Place) -> list[tuple[str, Place]]:
        """Return the sample and evaluate stages of all candidates. Raises PipelineError if there is none."""
        asked, every = place.experiment.evaluate.checkpoints, place.experiment.evaluate.checkpoint_interval
        if not (candidates := selection.list_candidates(place)):
            raise_no_checkpoint(place, f"for evaluate.checkpoints={asked}")
        if every and len(candidates) < (expected := place.experiment.train.steps // every):
            log.warning(
                "evaluate.checkpoints=%s: %d of %d checkpoints are there; the others were deleted",
                asked, len(candidates), expected,
            )  # fmt: skip
        return [(stage, candidate) for candidate in candidates.values() for stage in ("sample", "evaluate")]

    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Write the selection, after all candidates are scored; yields no unit."""
        selection.write_selection(place)
        yield from ()


STAGE = SelectStage()
