"""The train stage, and the loop of each of its workers.

The order of images, noise, t, flips and dropout are functions of (seed, step, row of the global batch), so a
worker needs no memory but the TrainState, and it does not matter how the batch is cut into slices.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from typing import cast

import torch
from torch import nn

from ddpm.diffusion import Diffusion
from ddpm.graphs import RecordedGradients, can_record
from ddpm.images import to_uint8
from ddpm.networks.build import allocate_weights
from ddpm.precision import use_deterministic
from ddpm.rng import Stream, draw_permutation
from ddpm.sampler import sample
from ddpm.training import TrainState, compute_gradients, compute_learning_rate, train_step
from pipeline.compute.memory import choose_accumulate
from pipeline.compute.step_timer import StepTimer
from pipeline.compute.units import GIB, Unit, Worker, translate_out_of_memory
from pipeline.config import Experiment, require_images_for_workers
from pipeline.config.sections import TrainStageConfig
from pipeline.data.dataset import open_dataset
from pipeline.drawing.grids import save_grid
from pipeline.errors import PipelineError
from pipeline.stages.stage import WorkerStage
from pipeline.store import checkpoint, diffusers_layout, tars
from pipeline.store.files import remove_leftovers
from pipeline.store.log import LogWriter
from pipeline.store.run import Place, list_steps
from pipeline.store.tensors import Tensors

CPU = torch.device("cpu")
logger = logging.getLogger(__name__)

GRID_SIDE = 8
GRID_STEPS = 50  # of the grids during training, which are for a quick look
CHECK_SECONDS = 3.0  # about how often a worker checks whether to stop or to save
STOP, SAVE = 1, 2  # what all workers are to do after a step; 0: nothing
FIRST_CHECK = 10  # steps; until a point of the log says how long a step takes


class TrainStage(WorkerStage):
    """Trains the network, or imports published weights, or uses the training images themselves as the network."""

    name = "train"
    adds_to_run = True

    def list_required_stages(self, experiment: Experiment) -> tuple[str, ...]:
        return () if experiment.published.weights else ("shard",)  # published ones need no images

    def is_done(self, place: Place) -> bool:
        return checkpoint.is_valid(place, place.experiment.train.steps)

    def needs_workers(self, place: Place) -> bool:
        return place.experiment.is_trained

    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Import published weights, or the training images; yields no unit."""
        if place.experiment.published.weights:
            checkpoint.save_untrained(place, diffusers_layout.read_weights(place.experiment))
        else:
            images, _ = tars.load_images(place.data, "train")
            checkpoint.save_untrained(place, {"images": torch.from_numpy(images).contiguous()})
        yield from ()

    def find_step_range(self, place: Place) -> tuple[int, int]:
        steps = place.experiment.train.steps
        return max(list_steps(place.train, steps), default=0), steps

    def run_worker(self, ctx: Worker, place: Place) -> None:
        """Train from the newest valid checkpoint to `train.steps`, or until the stop file appears."""
        experiment, newest = place.experiment, None
        require_images_for_workers(experiment.train, ctx.world_size)
        if ctx.rank == 0:
            remove_leftovers(place.train)  # of a group that was killed before this one
            newest = checkpoint.find_newest_step(place, experiment.train.steps)
        newest = ctx.broadcast(newest)
        config = replace(experiment.train, accumulate=_choose_accumulate(ctx, place, newest))
        remedy = f"train.accumulate={2 * (config.accumulate or 1)}, model.recompute, train.graph=false, precision=bf16 "
        remedy += "or more workers; `ddpm doctor EXPERIMENT` says what a step takes"
        with use_deterministic(config.deterministic), translate_out_of_memory("a training step", remedy):
            self._train(ctx, place.replace_experiment(replace(experiment, train=config)), newest)

    def _train(self, ctx: Worker, place: Place, newest: int | None) -> None:
        state, sums = _restore_state(ctx, place, newest)
        config = place.experiment.train
        if config.graph and not can_record(state, ctx.world_size):
            logger.warning("train.graph is off: it needs one worker, a GPU, t_sampling=uniform, recompute=0")
            config = replace(config, graph=False)
            place = place.replace_experiment(replace(place.experiment, train=config))
        make_step, check = _build_step(ctx, place, state), _StopCheck(ctx, place)
        timer = StepTimer(ctx, state.net)
        log = LogWriter(place) if ctx.rank == 0 else None
        with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as thread:
            saver = _CheckpointSaver(ctx, place, thread)
            request = 0
            while state.step < config.steps and request != STOP:
                timer.begin()
                sums.add(make_step())
                step = state.step
                if log:
                    log.beat(step)
                save = step % config.checkpoint_every == 0 or step in (config.steps, *config.keep_steps)
                if save or step % config.log_every == 0:
                    point = sums.compute_point(ctx, config, step) | timer.compare_ranks()
                    check.set_interval(point["train/images_per_second"])
                    if log:
                        log.write(step, point)
                    sums = _LogSums(step, ctx.device)
                request = check.decide(step)
                # Before the checkpoint: a run that continues from it draws no grid of this step.
                if config.sample_every and step % config.sample_every == 0 and ctx.rank == 0:
                    _draw_grid(ctx, place, state)
                if save or request:
                    saver.start(state, sums.collect_tensors(ctx, step))
                    check.last_save = time.monotonic()
            saver.finish()


STAGE = TrainStage()


def slice_batch(batch_size: int, rank: int, world_size: int) -> torch.Tensor:
    """Return the rows of the global batch that `rank` works on, int64; of unequal numbers if it does not divide."""
    return torch.arange(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def list_image_indices(
    seed: int, num_images: int, step: int, batch_size: int, rows: torch.Tensor, device: torch.device = CPU
) -> torch.Tensor:
    """Return the indices of the images in these consecutive rows of the global batch at `step`, int64 on `device`.

    Slot k = step * batch_size + row holds image perm_e[k mod N] with e = k // N: every image once per epoch,
    whatever the number of workers, the batch size or the step at which a process starts.
    """
    slot, left, parts = step * batch_size + int(rows[0]), len(rows), []
    while left > 0:
        epoch, first = divmod(slot, num_images)
        parts.append(_permute_images(seed, epoch, num_images, device)[first : first + left])
        slot, left = slot + len(parts[-1]), left - len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=2)  # a batch touches few epochs, in ascending order
def _permute_images(seed: int, epoch: int, num_images: int, device: torch.device) -> torch.Tensor:
    return draw_permutation(seed, Stream.ORDER, epoch, num_images, device)


class _StopCheck:
    """Decides, at the same steps on all workers, whether they stop, or save a checkpoint before `checkpoint_every`."""

    def __init__(self, ctx: Worker, place: Place):
        self.ctx, self.place, self.config = ctx, place, place.experiment.train
        self.interval = min(FIRST_CHECK, self.config.log_every)  # steps
        self.last_save, self.has_notice = time.monotonic(), False

    def set_interval(self, images_per_second: float) -> None:
        """Check every CHECK_SECONDS from now on; the rate is the same on all workers."""
        steps = int(CHECK_SECONDS * images_per_second / self.config.batch_size)
        self.interval = max(1, min(steps, self.config.log_every))

    def decide(self, step: int) -> int:
        """Return the decision of rank 0, by the stop file, the clock, and the notice that a node will be lost."""
        # On a GPU, check rarely: the result waits for its queue.
        if self.ctx.device.type != "cpu" and step % self.interval:
            return 0
        minutes = self.config.checkpoint_minutes
        is_due = minutes is not None and time.monotonic() - self.last_save > 60 * minutes
        if step % self.interval == 0 and not self.has_notice and self.ctx.will_lose_node():
            self.has_notice = is_due = True
            logger.warning("a node will be lost soon: writing a checkpoint of step %d, then continuing", step)
        return self.ctx.broadcast_number(STOP if self.place.stop_file.exists() else SAVE if is_due else 0)


class _LogSums:
    """Sums of loss and gradient norm since the last point of the log, on the device.

    A run that is stopped between two points saves the sums, so that its curve is that of an uninterrupted run.
    """

    def __init__(self, step: int, device: torch.device):
        self.start, self.began, self.time = step, step, time.perf_counter()
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, metrics: Tensors) -> None:
        self.sums += torch.stack((metrics["loss"], metrics["grad_norm"]))

    def compute_means(self, ctx: Worker, step: int) -> tuple[float, float]:
        """Return mean loss and gradient norm over workers and steps. Raises PipelineError if they are not finite."""
        loss, grad_norm = (ctx.sum_over_workers(self.sums) / ctx.world_size / (step - self.start)).tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise PipelineError(
                f"the training loss became {loss} (gradient norm {grad_norm}) between steps {self.start} and {step}; "
                "the checkpoints before it are kept: lower train.lr, or use train.precision=fp32"
            )
        return loss, grad_norm

    def compute_point(self, ctx: Worker, config: TrainStageConfig, step: int) -> dict[str, float]:
        """Return the metrics of the log's point at `step`; the rate is the same on all workers."""
        loss, grad_norm = self.compute_means(ctx, step)
        seconds = ctx.broadcast(time.perf_counter() - self.time)
        return {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": compute_learning_rate(config, step - 1),
            "train/images_per_second": config.batch_size * (step - self.began) / seconds,
        }

    def collect_tensors(self, ctx: Worker, step: int) -> Tensors:
        """Return the sums of all ranks, to save them in a checkpoint between two points of the log."""
        if self.start == step:
            return {}
        self.compute_means(ctx, step)  # a state that has diverged is not kept
        sums = self.sums.new_zeros(ctx.world_size, 2)
        sums[ctx.rank] = self.sums
        return {"window.sums": ctx.sum_over_workers(sums), "window.start": torch.tensor(self.start)}

    def load_tensors(self, ctx: Worker, tensors: Tensors) -> None:
        """Restore the sums of this rank; divide them equally if the number of workers changed."""
        sums = tensors["window.sums"]
        self.sums.copy_(sums[ctx.rank] if len(sums) == ctx.world_size else sums.mean(dim=0))
        self.start = int(tensors["window.start"])


class _CheckpointSaver:
    """Writes checkpoints in a thread of rank 0, one at a time, while training continues.

    Every rank reports a checkpoint once it is on disk: before the next one is written, or at the end. Then old ones are
    deleted.
    """

    def __init__(self, ctx: Worker, place: Place, thread: ThreadPoolExecutor):
        self.ctx, self.place, self.thread = ctx, place, thread
        self.pending: Future[None] | None = None
        self.state: Tensors = {}
        self.ema: Tensors = {}
        self.step: int | None = None

    def start(self, state: TrainState, sums: Tensors) -> None:
        self.finish()
        self.step = state.step
        folder = self.place.locate_step(state.step)
        if self.ctx.rank == 0 and not checkpoint.is_valid(self.place, state.step):
            config = self.place.experiment.train
            facts = {key: getattr(config, key) for key in ("accumulate", "compile", "graph", "deterministic")}
            self.state = checkpoint.copy_to_cpu(state.state_dict() | sums, self.state)
            self.ema = checkpoint.copy_to_cpu(state.emas[0].state_dict(), self.ema)
            self.pending = self.thread.submit(
                checkpoint.save_checkpoint, folder, self.state, self.ema, state.step,
                run_key=self.place.run_key, **facts,
            )  # fmt: skip

    def finish(self) -> None:
        """Wait until the checkpoint is written, then delete old ones; raise an error of the thread again."""
        if self.step is None:
            return
        if self.pending:
            self.pending.result()
        if self.ctx.rank == 0:
            checkpoint.delete_old_checkpoints(self.place, self.step)
        self.ctx.report_checkpoint(self.step)
        self.step = None


def _choose_accumulate(ctx: Worker, place: Place, newest: int | None) -> int:
    """Return train.accumulate; if it is null, that of the newest checkpoint, or the least for rank 0's GPU."""
    config, parts = place.experiment.train, 1
    if config.accumulate is not None:
        return config.accumulate
    if newest is not None:
        return checkpoint.read_meta(place.locate_step(newest)).get("accumulate") or 1
    if ctx.rank == 0 and (card := _read_gpu_memory(ctx.device)):
        parts = choose_accumulate(place.experiment, -(-config.batch_size // ctx.world_size), card)
        logger.warning("train.accumulate=%d, by what a step takes of this GPU's %.0f GiB", parts, card)
    return ctx.broadcast(parts)


def _read_gpu_memory(device: torch.device) -> float | None:
    """Return the GiB of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None


def _restore_state(ctx: Worker, place: Place, newest: int | None) -> tuple[TrainState, _LogSums]:
    """Return the state and the sums of a checkpoint, or new ones, on this worker's device."""
    experiment = place.experiment
    net = checkpoint.create_network(experiment).to(ctx.device).to(memory_format=torch.channels_last)
    if ctx.world_size > 1 and any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        if ctx.device.type == "cpu":
            raise PipelineError(
                f"BatchNorm over {ctx.world_size} CPU workers would see each worker's images only: "
                "use cluster.workers=1, or model.norm=group"
            )
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # its statistics are those of the global batch
    state = TrainState(experiment.train, net, experiment.diffusion)
    if newest is None:
        return state, _LogSums(state.step, ctx.device)
    folder = place.locate_step(newest)
    tensors = checkpoint.load_checkpoint(folder)
    saved_sums = {name: tensors.pop(name) for name in list(tensors) if name.startswith("window.")}
    try:
        state.load_state_dict(tensors)
    except ValueError as error:
        raise PipelineError(f"{folder}: {error}; delete it to continue from an earlier step") from error
    sums = _LogSums(state.step, ctx.device)
    if saved_sums:
        sums.load_tensors(ctx, saved_sums)
    return state, sums


def _build_step(ctx: Worker, place: Place, state: TrainState) -> Callable[[], Tensors]:
    experiment, config = place.experiment, place.experiment.train
    images = open_dataset(place.data, "train", ctx)
    rows = slice_batch(config.batch_size, ctx.rank, ctx.world_size)
    list_indices = partial(
        list_image_indices, experiment.seed, len(images),
        batch_size=config.batch_size, rows=rows, device=images.index_device,
    )  # fmt: skip
    diffusion = Diffusion(experiment.diffusion).to(ctx.device)
    forward = ctx.wrap_network(state.net)
    if config.compile:
        forward = cast(nn.Module, torch.compile(forward))
    compute = RecordedGradients() if config.graph else None

    def read_batch() -> tuple[torch.Tensor, torch.Tensor | None]:
        for ahead in range(images.lookahead):
            images.prefetch(list_indices(state.step + ahead))
        x_0, labels = images.read_batch(list_indices(state.step))
        return x_0, labels if experiment.model.takes_labels else None

    def make_step() -> Tensors:
        x_0, context = read_batch()
        return train_step(
            state, diffusion, x_0, rows,
            config=config, seed=experiment.seed, context=context, forward=forward,
            world_size=ctx.world_size, sum_over_workers=ctx.sum_over_workers, compute=compute,
        )  # fmt: skip

    if ctx.world_size > 1:
        _fix_gradient_buckets(state, diffusion, *read_batch(), rows, config, forward)
    return make_step


def _fix_gradient_buckets(
    state: TrainState, diffusion: Diffusion, x_0: torch.Tensor, context: torch.Tensor | None, rows: torch.Tensor,
    config: TrainStageConfig, forward: nn.Module,
) -> None:  # fmt: skip
    """Compute the gradients of one part of a step and discard them, so that DDP's buckets get their final layout.

    DDP rebuilds them after the first pass, and sums depend on an element's place in its bucket: a resumed run must
    start from the layout of an uninterrupted one.
    """
    part = slice(0, max(1, len(rows) // (config.accumulate or 1)))
    buffers = [buffer.clone() for buffer in state.net.buffers()]  # running statistics of BatchNorm
    compute_gradients(
        state, diffusion, x_0[part], rows[part],
        config=replace(config, accumulate=1), seed=0, context=None if context is None else context[part],
        forward=forward,
    )  # fmt: skip
    for buffer, before in zip(state.net.buffers(), buffers, strict=True):
        buffer.copy_(before)
    state.net.zero_grad(set_to_none=True)


@torch.no_grad()
def _draw_grid(ctx: Worker, place: Place, state: TrainState) -> None:
    """Draw a grid of EMA samples, from the same noise at every step.

    Where the network takes labels, it draws each class in turn.
    """
    experiment, path = place.experiment, place.locate_grid(state.step)
    if path.exists():
        return
    net = allocate_weights(checkpoint.create_network(experiment, "meta"), ctx.device)
    net.load_state_dict(state.emas[0].state_dict())
    index = torch.arange(GRID_SIDE**2, device=ctx.device)
    labels = index % experiment.data.labels if experiment.model.takes_labels else None
    images = sample(
        Diffusion(experiment.diffusion), net.eval(),
        index=index, shape=experiment.data.shape, context=labels,
        seed=experiment.seed, sampler="ddim", eta=1.0, steps=min(GRID_STEPS, experiment.diffusion.timesteps),
    )  # fmt: skip
    save_grid(to_uint8(images).cpu(), GRID_SIDE, path)
