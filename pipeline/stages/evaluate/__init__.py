"""The evaluate stage: scores of the samples, the NLL bound of the test split, each with its protocol.

`stage` decides what is missing and seals the scores, `images` makes those of samples (FID, IS, KID, precision and
recall), `bound` the NLL of any denoiser, `protocol` says how they came about and what of that is not the paper's.
"""

from collections.abc import Iterator

from pipeline.compute.work import Done, Unit
from pipeline.config import Experiment
from pipeline.stages.evaluate.stage import check, directory, follow_samples, is_done, needs_samples, work
from pipeline.stages.stage import Stage
from pipeline.store.run import Place

__all__ = ["STAGE", "check", "directory", "follow_samples", "is_done", "needs_samples", "work"]


class EvaluateStage(Stage):
    """Scores the samples and the bound of the chosen checkpoint."""

    name = "evaluate"
    chosen = True

    def needs(self, experiment: Experiment) -> tuple[str, ...]:
        samples = ("sample",) if needs_samples(experiment) else ()
        return ("shard", "train", *samples, *(("select",) if experiment.evaluate.checkpoints else ()))

    def is_done(self, place: Place) -> bool:
        return is_done(place.experiment, place)

    def work(self, place: Place) -> Iterator[list[Unit]]:
        return work(place.experiment, place)

    def check(self, place: Place) -> None:
        check(place.experiment, place)

    def follow(self, place: Place) -> Done | None:
        return follow_samples(place.experiment, place)


STAGE = EvaluateStage()
