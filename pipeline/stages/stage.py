"""What a stage is. The engine asks a stage these questions, and decides nothing by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pipeline.compute.units import Unit, Worker
from pipeline.config import Experiment
from pipeline.store.run import Place


class Stage(ABC):
    """A part of a run that is made of work units, and is done or not.

    name: what people type.
    selects_checkpoint: it makes the selection.
    uses_checkpoint: it works on the checkpoint that sample.checkpoint means.
    shows_other_stages: it shows results of the other stages, so it is asked again whenever one of them had work.
    """

    name: ClassVar[str]
    selects_checkpoint: ClassVar[bool] = False
    uses_checkpoint: ClassVar[bool] = False
    shows_other_stages: ClassVar[bool] = False

    def list_required(self, experiment: Experiment) -> tuple[str, ...]:
        """Name the stages that come before it."""
        return ()

    @abstractmethod
    def is_done(self, place: Place) -> bool:
        """Tell whether its result is on disk and current. Reads no image and loads no network."""

    @abstractmethod
    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Yield rounds of units, each to be finished before the next; then seal the result.

        A unit whose result is on disk is not yielded again. Raises PipelineError.
        """

    def list_inputs(self, place: Place) -> list[tuple[str, Place]]:
        """List the stages whose results it reads, each with its place; they are brought up to date before it works."""
        return []

    def check_before_training(self, place: Place) -> None:  # noqa: B027 - most have nothing to say
        """Raise PipelineError for what the shards alone show to be impossible, before hours of training."""

    def find_shared_folder(self, place: Place) -> Path | None:
        """Return the folder that it writes to and other runs share; None where it writes to the run's own."""
        return None


class GroupStage(Stage):
    """A stage that one group of workers does together. Where no workers are needed, `work` does it in this process."""

    @abstractmethod
    def needs_group(self, place: Place) -> bool:
        """Tell whether workers are needed."""

    @abstractmethod
    def count_steps(self, place: Place) -> tuple[int, int]:
        """Return the step from which the group goes on, and the last one."""

    @abstractmethod
    def read_progress(self, place: Place) -> tuple[int, str]:
        """Return the step that the group has reached, and a word on it."""

    @abstractmethod
    def run_worker(self, ctx: Worker, place: Place) -> None:
        """Do one worker's share, from the newest checkpoint to the end or until the stop file appears."""
