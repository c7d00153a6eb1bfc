"""What a stage is. The engine asks a stage these questions, and decides nothing by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pipeline.compute.work import Done, Unit, WorkerContext
from pipeline.config import Experiment
from pipeline.store.run import Place


class Stage(ABC):
    """A part of a run that is made of work units, and is done or not.

    name: what people type; chooses: it makes the selection; chosen: it works on the checkpoint that was chosen;
    shows_others: it shows what the other stages left, so it is looked at again whenever one of them had work.
    """

    name: ClassVar[str]
    chooses: ClassVar[bool] = False
    chosen: ClassVar[bool] = False
    shows_others: ClassVar[bool] = False

    def needs(self, experiment: Experiment) -> tuple[str, ...]:
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

    def parts(self, place: Place) -> list[tuple[str, Place]]:
        """List the work of other stages that it puts together: (stage, of which place), done before its own."""
        return []

    def early_parts(self, place: Place) -> list[tuple[str, Place]]:
        """List those of its parts that can be done while training goes on."""
        return []

    def check(self, place: Place) -> None:  # noqa: B027 - most have nothing to say
        """Raise PipelineError for what the shards alone show to be impossible, before hours of training."""

    def follow(self, place: Place) -> Done | None:
        """Return what can be done as soon as a unit of an earlier stage is there; None for nothing."""
        return None

    def lock(self, place: Place) -> Path | None:
        """Return the folder that it writes to and other runs share; None for the run's own."""
        return None


class GroupStage(Stage):
    """A stage that one group of workers does together. Where no workers are needed, `work` does it in
    this process."""

    @abstractmethod
    def needs_group(self, place: Place) -> bool:
        """Tell whether workers are needed, or `work` alone does it."""

    @abstractmethod
    def count_steps(self, place: Place) -> tuple[int, int]:
        """Return the step from which the group goes on, and the last one."""

    @abstractmethod
    def body(self, ctx: WorkerContext, place: Place) -> None:
        """Do one worker's share, from the newest checkpoint to the end or until the stop file appears."""
