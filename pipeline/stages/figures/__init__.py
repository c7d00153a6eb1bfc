"""The figures stage: the paper's figures of any checkpoint, as pictures beside their captions.

`stage` decides what is drawn and seals it, `figure` says what a figure is, `chains` holds those that run the reverse
process, `curves` those that plot numbers, `nearest` those that look up training images.
"""

from collections.abc import Iterator

from pipeline.compute.work import Unit
from pipeline.config import Experiment
from pipeline.stages.figures.stage import directory, is_done, work
from pipeline.stages.stage import Stage
from pipeline.store.run import Place

__all__ = ["STAGE", "directory", "is_done", "work"]


class FiguresStage(Stage):
    """Draws the paper's figures of the chosen checkpoint."""

    name = "figures"
    chosen = True

    def needs(self, experiment: Experiment) -> tuple[str, ...]:
        return ("shard", "train", "sample")

    def is_done(self, place: Place) -> bool:
        return is_done(place.experiment, place)

    def work(self, place: Place) -> Iterator[list[Unit]]:
        return work(place.experiment, place)


STAGE = FiguresStage()
