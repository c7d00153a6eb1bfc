"""Units, the worker that runs them, and running them in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from pipeline.errors import PipelineError
from pipeline.store.run import Place

if TYPE_CHECKING:  # importing torch takes seconds, and a command that is up to date needs none of it
    import torch
    from torch import nn

NO_LIMIT = 2**62
GIB = 2**30
Value = TypeVar("Value")


class UnitKind(StrEnum):
    SHARD = "shard"
    SAMPLES = "samples"
    FEATURES = "features"
    NLL = "nll"
    PREPARATION = "preparation"
    FIGURE = "figure"


SMALLER = {
    UnitKind.SAMPLES: "lower sample.batch_size",
    UnitKind.NLL: "lower evaluate.nll_batch_size",
    UnitKind.FIGURE: "lower figures.images",
}


@contextmanager
def translate_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn a GPU's lack of memory inside the context into a PipelineError, which no executor tries again."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PipelineError(f"{what} needs more memory than this GPU has: {remedy}") from error


@dataclass(frozen=True)
class Unit:
    """A piece of work with one result, written atomically by the module-level function `body(ctx, *args)`.

    name: for messages of failure. needs_gpu: it uses a network, so it gets a GPU if there is one.
    images, passes: its share of the progress, and how many passes of a network each image takes.
    """

    kind: UnitKind
    body: Callable[..., None]
    args: tuple[object, ...]
    name: str
    images: int = 1
    passes: int = 1
    needs_gpu: bool = False

    def run(self, ctx: Worker) -> float:
        """Run the body in this process; return the seconds it took."""
        began = time.perf_counter()
        with translate_out_of_memory(f"'{self.name}'", SMALLER.get(self.kind, "use a GPU with more")):
            self.body(ctx, *self.args)
        return time.perf_counter() - began


def make_network_unit(
    kind: UnitKind, body: Callable[..., None], args: tuple[object, ...], file: Path, name: str, images: int,
    passes: int = 1,
) -> dict[Path, Unit]:  # fmt: skip
    """Return {file: unit} of a unit that uses a network: `body(ctx, *args, file)` writes this file."""
    return {file: Unit(kind, body, (*args, file), name, images, passes, needs_gpu=True)}


def make_image_units(
    kind: UnitKind, body: Callable[..., None], args: tuple[object, ...], n: int, size: int, folder: Path, name: str,
    passes: int = 1,
) -> dict[Path, Unit]:  # fmt: skip
    """Return {result file: unit} of `size` images each; `body(ctx, *args, start, stop, file)` uses a network."""
    units = dict[Path, Unit]()
    for start in range(0, n, size):
        stop = min(start + size, n)
        file, title = folder / f"{start:06d}-{stop:06d}.npz", f"{name} {start}-{stop - 1}"
        units |= make_network_unit(kind, body, (*args, start, stop), file, title, stop - start, passes)
    return units


WhenDone = Callable[[Unit], None]  # called with each unit that is finished
Cost = tuple[str, int, float]  # of a unit: its kind, images, seconds


@dataclass
class Worker:
    """One worker: rank, device, CPUs, and the bytes that it may use for training images.

    This one works alone; `RayWorker` reaches the others. Every rank must call every method equally often.
    """

    device: torch.device
    cpus: int
    rank: int = 0
    world_size: int = 1
    image_memory: int = NO_LIMIT

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value, on every rank."""
        return value

    def broadcast_number(self, number: int) -> int:
        """Return rank 0's number on every rank; cheap enough for every step."""
        return number

    def will_lose_node(self) -> bool:
        """Return whether a worker's node will be lost soon, the same on every rank; takes milliseconds."""
        return False

    def sum_over_workers(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def wrap_network(self, net: nn.Module) -> nn.Module:
        """Return `net` with gradients averaged over the workers."""
        return net

    def report_checkpoint(self, step: int) -> None:
        """Tell Ray Train that the checkpoint of `step` is on disk."""


Body = Callable[[Worker, Place], None]


class Executor(Protocol):
    """Runs training bodies and units: in this process (`LocalExecutor`), or on Ray (`pipeline.compute.session`)."""

    costs: list[Cost]
    is_interrupted: Callable[[], bool]

    def run_workers(self, body: Body, place: Place) -> None:
        """Run `body` on every worker of a training."""

    def run_units(self, units: Sequence[Unit], done: WhenDone) -> None:
        """Run the units, and call `done` after each."""


def create_local_worker(cpus: int | None = None, image_memory: int = NO_LIMIT) -> Worker:
    """Return the worker that is this process: the first GPU, if any, and `cpus` CPUs (None: all it may use)."""
    import torch

    # What train.deterministic needs, before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return Worker(device, cpus or len(os.sched_getaffinity(0)), image_memory=image_memory)


class LocalExecutor:
    """Executor that runs everything in this process, without Ray (`cluster.workers=0`)."""

    def __init__(self, context: Worker, is_interrupted: Callable[[], bool] = lambda: False):
        import torch

        self.context, self.is_interrupted = context, is_interrupted
        self.costs: list[Cost] = []
        torch.set_num_threads(self.context.cpus)

    def run_workers(self, body: Body, place: Place) -> None:
        body(self.context, place)

    def run_units(self, units: Sequence[Unit], done: WhenDone) -> None:
        for unit in units:
            self.costs.append((unit.kind, unit.images, unit.run(self.context)))
            done(unit)
            if self.is_interrupted():
                return
