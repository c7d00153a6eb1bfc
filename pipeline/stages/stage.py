"""The base class of all stages. The engine asks a stage these questions, and plans nothing by its name."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pipeline.compute.units import Unit, Worker
from pipeline.config import Experiment
from pipeline.store.run import Place


class Stage(ABC):
    """A part of a run that consists of units, and is done or not.

    name: the command that people type; `select` runs with the stages that need it.
    selects_checkpoint: it makes the selection.
    uses_checkpoint: it works on the checkpoint that sample.checkpoint means.
    adds_to_run: it trains or draws; other code of `ddpm/` may do so only if the user accepts it.
    shows_other_stages: it shows results of the other stages, so it is asked again whenever one of them had work.
    """

    name: ClassVar[str]
    selects_checkpoint: ClassVar[bool] = False
    uses_checkpoint: ClassVar[bool] = False
    adds_to_run: ClassVar[bool] = False
    shows_other_stages: ClassVar[bool] = False

    def list_required_stages(self, experiment: Experiment) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def is_done(self, place: Place) -> bool:
        """Return whether its result is complete and its inputs unchanged. Reads no image and loads no network."""

    @abstractmethod
    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Yield rounds of units, each to be finished before the next; seal the result at the end.

        A unit whose result is on disk is not yielded again. Raises PipelineError.
        """

    def list_inputs(self, place: Place) -> list[tuple[str, Place]]:
        """Return the stages of other places that must be done first, as (stage name, place)."""
        return []

    def check_before_start(self, place: Place) -> None:  # noqa: B027 - most have nothing to say
        """Raise PipelineError if this machine lacks what the stage needs, before anything starts."""

    def check_before_training(self, place: Place) -> None:  # noqa: B027 - most have nothing to say
        """Raise PipelineError if the shards alone show that the stage cannot succeed, before hours of training."""

    def find_shared_folder(self, place: Place) -> Path | None:
        """Return the folder that other runs write to as well and that must be locked; None if there is none."""
        return None


class WorkerStage(Stage):
    """A stage that several workers do together. If no workers are needed, `work` does it in this process."""

    @abstractmethod
    def needs_workers(self, place: Place) -> bool:
        """Return whether workers are needed."""

    @abstractmethod
    def find_step_range(self, place: Place) -> tuple[int, int]:
        """Return the step at which the workers begin, and the last one."""

    @abstractmethod
    def run_worker(self, ctx: Worker, place: Place) -> None:
        """Do one worker's part, from the newest checkpoint to the end or until the stop file appears."""
