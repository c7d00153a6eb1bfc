"""The train stage: what each worker does, with or without peers.

The order of images, noise, t, flips and dropout are functions of (seed, step, row of the global batch), so a
worker needs no memory but the TrainState, and it does not matter how the batch is cut into slices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from ddpm.diffusion import Diffusion
from ddpm.images import to_uint8
from ddpm.rng import Stream, draw_permutation
from ddpm.sampler import sample
from ddpm.training import TrainState, compute_learning_rate, train_step
from pipeline.compute.units import Unit, Worker
from pipeline.config import Experiment, require_images_for_workers
from pipeline.data.dataset import open_dataset
from pipeline.drawing.grids import save_grid
from pipeline.errors import PipelineError
from pipeline.stages.stage import GroupStage
from pipeline.store import checkpoint, diffusers_layout
from pipeline.store.files import remove_leftovers
from pipeline.store.log import Heartbeat, LogWriter, read_progress
from pipeline.store.run import Place
from pipeline.store.tensors import Tensors

GRID_SIDE = 8
GRID_STEPS = 50  # DDIM steps of the grids on the way: a glance, not a score


class TrainStage(GroupStage):
    """Trains the network, or puts published weights in its place."""

    name = "train"

    def list_required(self, experiment: Experiment) -> tuple[str, ...]:
        return () if experiment.published.weights else ("shard",)  # published ones need no images

    def is_done(self, place: Place) -> bool:
        return checkpoint.is_valid(place.step_folder(place.experiment.train.steps))

    def needs_group(self, place: Place) -> bool:
        return not place.experiment.published.weights

    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Import published weights, which takes no worker."""
        diffusers_layout.import_published_weights(place)
        yield from ()

    def count_steps(self, place: Place) -> tuple[int, int]:
        steps = place.experiment.train.steps
        return max(checkpoint.list_steps(place.train, steps), default=0), steps

    def read_progress(self, place: Place) -> tuple[int, str]:
        step, loss = read_progress(place)
        return step, "" if loss is None else f"loss {loss:.4f}"

    def run_worker(self, ctx: Worker, place: Place) -> None:
        """Train from the newest whole checkpoint to `train.steps`, or until the run's stop file appears."""
        experiment, config = place.experiment, place.experiment.train
        require_images_for_workers(config, ctx.world_size)
        torch.use_deterministic_algorithms(config.deterministic)
        if ctx.rank == 0:
            remove_leftovers(place.train)  # of a group that was killed before this one
        state, window = _restore(ctx, place)
        step = _build_step(ctx, place, state)
        log = LogWriter(place.log) if ctx.rank == 0 else None
        heartbeat = Heartbeat(place.heartbeat) if ctx.rank == 0 else None
        with _Saves(ctx, place) as saves:
            while state.step < config.steps:
                window.add(step())
                if heartbeat:
                    heartbeat.write(state.step)
                save = state.step % config.checkpoint_every == 0 or state.step == config.steps
                if save or state.step % config.log_every == 0:
                    _log_point(ctx, experiment, state.step, window, log)
                    window = _Window(state.step, ctx.device)
                stop = _stop_requested(ctx, place, state.step, config.log_every)
                if save or stop:
                    saves.begin(state, window.tensors(ctx, state.step))
                if config.sample_every and state.step % config.sample_every == 0 and ctx.rank == 0:
                    _draw_grid(ctx, place, state)
                if stop:
                    return


STAGE = TrainStage()


def slice_batch(batch_size: int, rank: int, world_size: int) -> torch.Tensor:
    """The rows of the global batch that `rank` works on, int64; uneven where it does not divide."""
    return torch.arange(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


class ImageOrder:
    """The stateless order of the training images.

    Slot k = step * batch_size + row holds image perm_e[k mod N] with e = k // N: every image once per epoch,
    whatever the number of workers, the batch size or the step at which a process starts.
    """

    def __init__(self, seed: int, num_images: int):
        self.seed, self.num_images = seed, num_images

    def list_indices(self, step: int, batch_size: int, rows: torch.Tensor) -> torch.Tensor:
        """Image indices, int64 (len(rows),), of the global batch's `rows` at `step`."""
        slots = step * batch_size + rows
        epochs = slots // self.num_images
        found = torch.empty_like(slots)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            found[here] = _permutation(self.seed, epoch, self.num_images)[slots[here] % self.num_images]
        return found


@lru_cache(maxsize=2)  # a batch touches few epochs, in ascending order
def _permutation(seed: int, epoch: int, num_images: int) -> torch.Tensor:
    return draw_permutation(seed, Stream.ORDER, epoch, num_images)


class _Window:
    """Sums of loss and gradient norm since the last log point; they stay on the device until they are read.

    A run that is stopped between two points takes its sums along, so that its curve is an untouched run's.
    """

    def __init__(self, step: int, device: torch.device):
        self.start, self.began, self.time = step, step, time.perf_counter()
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, metrics: Tensors) -> None:
        self.sums += torch.stack((metrics["loss"], metrics["grad_norm"]))

    def means(self, ctx: Worker, step: int) -> tuple[float, float]:
        """Return loss over the global batch and gradient norm, averaged over the window's steps. Raises PipelineError
        where training has diverged."""
        loss, grad_norm = (ctx.total(self.sums) / ctx.world_size / (step - self.start)).tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise PipelineError(
                f"the training loss became {loss} (gradient norm {grad_norm}) between steps {self.start} and {step}; "
                "the checkpoints before it are kept: lower train.lr, or use train.precision=fp32"
            )
        return loss, grad_norm

    def tensors(self, ctx: Worker, step: int) -> Tensors:
        """Return the sums of all ranks, which a checkpoint between two points holds beside the state."""
        if self.start == step:
            return {}
        self.means(ctx, step)  # a state that has diverged is not kept
        sums = self.sums.new_zeros(ctx.world_size, 2)
        sums[ctx.rank] = self.sums
        return {"window.sums": ctx.total(sums), "window.start": torch.tensor(self.start)}

    def load_tensors(self, ctx: Worker, tensors: Tensors) -> None:
        """Take each rank's own, bit for bit; where their number has changed, their sum in equal parts."""
        sums = tensors["window.sums"]
        self.sums.copy_(sums[ctx.rank] if len(sums) == ctx.world_size else sums.mean(dim=0))
        self.start = int(tensors["window.start"])


class _Saves:
    """Checkpoints on their way to disk, one at a time. Rank 0 writes them beside the training; every rank
    reports each when it is safe: before the next one, or at the end."""

    def __init__(self, ctx: Worker, place: Place):
        self.ctx, self.place = ctx, place
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.state: Tensors = {}
        self.ema: Tensors = {}
        self.step: int | None = None

    def __enter__(self) -> _Saves:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.finish()
        self.thread.shutdown()

    def begin(self, state: TrainState, sums: Tensors) -> None:
        """Take a copy of the state, and of the sums since the last point, and write it while training goes on."""
        self.finish()
        self.step = state.step
        folder = self.place.step_folder(state.step)
        if self.ctx.rank == 0 and not checkpoint.is_valid(folder):
            config = self.place.experiment.train
            recorded = {key: getattr(config, key) for key in ("accumulate", "compile", "deterministic")}
            facts = {"run_key": self.place.run_key, **recorded}
            self.state = checkpoint.copy_to_cpu(state.state_dict() | sums, self.state)
            self.ema = checkpoint.copy_to_cpu(state.emas[0].state_dict(), self.ema)
            self.pending = self.thread.submit(
                checkpoint.save_checkpoint, folder, self.state, self.ema, state.step, facts
            )

    def finish(self) -> None:
        """Wait until the last one is on disk. Raises what writing it raised."""
        if self.step is None:
            return
        if self.pending:
            self.pending.result()
        if self.ctx.rank == 0:
            checkpoint.delete_old_checkpoints(self.place, self.step)
        self.ctx.report_checkpoint(self.step)
        self.step = None


def _restore(ctx: Worker, place: Place) -> tuple[TrainState, _Window]:
    """Load the newest whole checkpoint's state onto this worker's device, or make the first one; and its sums."""
    experiment = place.experiment
    net = checkpoint.create_network(experiment).to(ctx.device).to(memory_format=torch.channels_last)
    state = TrainState(experiment.train, _with_global_statistics(ctx, net), experiment.diffusion)
    found = ctx.broadcast(checkpoint.find_newest(place, experiment.train.steps) if ctx.rank == 0 else None)
    tensors = {} if found is None else checkpoint.load_checkpoint(place.step_folder(found))
    sums = {name: tensors.pop(name) for name in list(tensors) if name.startswith("window.")}
    if tensors:
        state.load_state_dict(tensors)
    window = _Window(state.step, ctx.device)
    if sums:
        window.load_tensors(ctx, sums)
    return state, window


def _with_global_statistics(ctx: Worker, net: nn.Module) -> nn.Module:
    """BatchNorm sees the global batch, so that the number of workers does not change what is computed."""
    if ctx.world_size == 1 or not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        return net
    if ctx.device.type == "cpu":
        raise PipelineError(
            f"BatchNorm over {ctx.world_size} CPU workers would see each worker's images only: "
            "use cluster.workers=1, or model.norm=group"
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return converted


def _build_step(ctx: Worker, place: Place, state: TrainState) -> Callable[[], Tensors]:
    """Return a function that makes one training step."""
    experiment, config = place.experiment, place.experiment.train
    images = open_dataset(place.data, "train", ctx)
    order = ImageOrder(experiment.seed, len(images))
    rows = slice_batch(config.batch_size, ctx.rank, ctx.world_size)
    diffusion = Diffusion(experiment.diffusion).to(ctx.device)
    forward = ctx.wrap_network(state.net)
    if config.compile:
        forward = cast(nn.Module, torch.compile(forward))
    _settle(forward, images.read_batch(torch.zeros(1, dtype=torch.int64))[0], len(rows))

    def step() -> Tensors:
        for ahead in range(images.lookahead):
            images.prefetch(order.list_indices(state.step + ahead, config.batch_size, rows))
        x_0, labels = images.read_batch(order.list_indices(state.step, config.batch_size, rows))
        return train_step(
            state, diffusion, x_0, rows,
            config=config, seed=experiment.seed, forward=forward,
            world_size=ctx.world_size, sum_over_workers=ctx.total,
            context=labels if experiment.takes_labels else None,
        )  # fmt: skip

    return step


def _settle(forward: nn.Module, image: torch.Tensor, count: int) -> None:
    """One throwaway forward and backward: DDP rebuilds its buckets after the first, and sums depend on an
    element's place in its bucket, so a resumed run must start from the same layout as an untouched one."""
    x = image.float().expand(count, -1, -1, -1)
    forward.eval()  # running statistics of normalisation layers stay as they are
    forward(x, torch.zeros(count, dtype=torch.int64, device=x.device)).sum().backward()
    forward.train()
    forward.zero_grad(set_to_none=True)


def _stop_requested(ctx: Worker, place: Place, step: int, log_every: int) -> bool:
    """Whether all ranks stop after this step. A GPU is asked seldom: the answer waits for its queue."""
    if ctx.device.type != "cpu" and step % log_every:
        return False
    return ctx.broadcast_flag(place.stop_file.exists())


def _log_point(
    ctx: Worker, experiment: Experiment, step: int, window: _Window, log: LogWriter | None
) -> None:
    loss, grad_norm = window.means(ctx, step)
    if log:
        # Of this process: the steps before it was stopped are not its own.
        speed = (step - window.began) / (time.perf_counter() - window.time)
        metrics = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": compute_learning_rate(experiment.train, step - 1),
            "train/images_per_second": speed * experiment.train.batch_size,
        }
        log.write(step, metrics)


@torch.no_grad()
def _draw_grid(ctx: Worker, place: Place, state: TrainState) -> None:
    """Draw EMA samples from the same noise every time, so that the grids of one run show the same images grow; of
    each class in turn, where the network takes labels."""
    experiment, path = place.experiment, place.grid(state.step)
    if path.exists():
        return
    net = checkpoint.create_network(experiment, "meta").to_empty(device=ctx.device)
    net.load_state_dict(state.emas[0].state_dict())
    index = torch.arange(GRID_SIDE**2, device=ctx.device)
    labels = index % experiment.data.labels if experiment.takes_labels else None
    images = sample(
        Diffusion(experiment.diffusion), net.eval(),
        index=index, shape=experiment.data.shape, context=labels,
        seed=experiment.seed, sampler="ddim", steps=min(GRID_STEPS, experiment.diffusion.timesteps),
    )  # fmt: skip
    save_grid(to_uint8(images).cpu(), GRID_SIDE, path)
