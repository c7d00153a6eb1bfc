"""What a stage's body sees of the place where it runs, and the in-process twin of that place."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.store.run import Place

NO_LIMIT = 2**62
GIB = 2**30


@dataclass(frozen=True)
class Unit:
    """A piece of work that is complete or absent: `body(ctx, *args)` writes its result atomically.

    `body` is a module-level function; `name` opens with what it makes and is shown when it fails; `images` is
    its share of the progress, and `passes` says how many of a network each of them takes, where units of several kinds
    are made beside each other. `tar` is the one that it leaves, with its facts beside it, where others can go on
    with it.
    """

    body: Callable[..., None]
    args: tuple[Any, ...]
    name: str
    images: int = 1
    passes: int = 1
    tar: Path | None = None

    def run(self, ctx: WorkerContext) -> float:
        """Do the work here; returns the seconds it took."""
        began = time.perf_counter()
        self.body(ctx, *self.args)
        return time.perf_counter() - began


# Told of a unit that is finished; gives what can be done now that it is.
Done = Callable[[Unit], Sequence[Unit] | None]


class Spent:
    """Images made and the seconds of one worker that they took, by the first word of the units' names."""

    def __init__(self) -> None:
        self.by_kind: dict[str, dict[str, float]] = {}

    def add(self, unit: Unit, seconds: float) -> None:
        kind = self.by_kind.setdefault(unit.name.split()[0], {"images": 0, "seconds": 0.0})
        kind["images"] += unit.images
        kind["seconds"] += seconds


class WorkerContext:
    """One process among `world_size`, with the device, the CPUs, and the bytes for training images that it may use.

    This class is the lone worker; `pipeline.compute.cluster` has the one whose doors lead to its peers. Every method
    is called equally often on every rank.
    """

    def __init__(
        self,
        device: torch.device,
        cpus: int,
        rank: int = 0,
        world_size: int = 1,
        image_memory: int = NO_LIMIT,
    ):
        self.device, self.cpus, self.rank, self.world_size = device, cpus, rank, world_size
        self.image_memory = image_memory

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return value

    def decide(self, flag: bool) -> bool:
        """Rank 0's yes or no, on every rank: one number, cheap enough to be asked at every step."""
        return flag

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over all ranks."""
        return value

    def parallel(self, net: nn.Module) -> nn.Module:
        """`net` as its training forward is called: with gradients averaged over the ranks."""
        return net

    def report(self, step: int) -> None:
        """Tell the launcher that the checkpoint of `step` is safe on disk."""


class Executor(Protocol):
    """Who runs bodies and units: `InProcess` here, a Ray session in `pipeline.compute.cluster`."""

    spent: Spent

    @property
    def spare(self) -> int:
        """How many units can be under way while `run_workers` is, without taking anything from it."""
        ...

    def run_workers(self, body: Callable[..., None], experiment: Any, run: Place) -> None: ...

    def map_units(self, units: Sequence[Unit], done: Done) -> None: ...


def local_context(cpus: int | None = None, image_memory: int = NO_LIMIT) -> WorkerContext:
    """This process as a worker: the first GPU if there is one, and so many CPUs (None: every one it may use)."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return WorkerContext(device, cpus or len(os.sched_getaffinity(0)), image_memory=image_memory)


class InProcess:
    """Runs everything here, one after the other, without Ray (`cluster.workers=0`)."""

    spare = 0

    def __init__(self, context: WorkerContext, interrupted: Callable[[], bool] = lambda: False):
        self.context, self.interrupted, self.spent = context, interrupted, Spent()
        torch.set_num_threads(self.context.cpus)

    def run_workers(self, body: Callable[..., None], experiment: Any, run: Place) -> None:
        body(self.context, experiment, run)

    def map_units(self, units: Sequence[Unit], done: Done) -> None:
        waiting = deque(units)
        while waiting:
            unit = waiting.popleft()
            self.spent.add(unit, unit.run(self.context))
            waiting.extend(done(unit) or ())
            if self.interrupted():
                return
