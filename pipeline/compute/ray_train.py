"""Training on several workers by Ray Train and torch.distributed."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from ray import PlacementGroupID
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group
from torch import nn

from pipeline.compute.resources import Resources
from pipeline.compute.units import GIB, Body, Value, Worker
from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError, shorten_error
from pipeline.store.files import write_text
from pipeline.store.run import Place

POLL_SECONDS = 0.5


class RayWorker(Worker):
    """Worker of a training group: reaches the others through torch.distributed."""

    def broadcast(self, value: Value) -> Value:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_flag(self, flag: bool) -> bool:
        decision = torch.tensor(int(flag), device=self.device)
        torch.distributed.broadcast(decision, src=0)
        return bool(decision)

    def sum_over_workers(self, value: torch.Tensor) -> torch.Tensor:
        summed = value.clone()
        torch.distributed.all_reduce(summed)
        return summed

    def wrap_network(self, net: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return net
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=devices, broadcast_buffers=False)

    def report_checkpoint(self, step: int) -> None:
        from ray import train

        if self.rank > 0:
            train.report({"step": step})
            return
        with tempfile.TemporaryDirectory() as folder:
            # A pointer only: Ray copies in place and calls a run corrupted whose registered folder vanished,
            # so the step folders in the run directory stay the authority.
            (Path(folder) / "step").write_text(str(step))
            train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(folder))


def run_training_group(
    cluster: ClusterConfig, resources: Resources, body: Body, place: Place, look: Callable[[], object]
) -> None:
    """Train with DDP on a group of Ray workers; a lost worker restarts it from the newest checkpoint.

    That happens up to `cluster.retries` times; a PipelineError in a worker ends it and is raised here, as is one of
    `look`, which is called again and again.
    """
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import ScalingConfig  # ray.train's own, with its types

    # Seconds between Ray Train's looks at the group; by default it sees two seconds late that training has ended.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    place.failure.unlink(missing_ok=True)
    shutil.rmtree(place.ray, ignore_errors=True)
    cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    fixed = resources.min_workers == resources.workers
    trainer = TorchTrainer(
        partial(_run_worker_body, body, place, cpus, int(cluster.image_memory * GIB)),
        scaling_config=ScalingConfig(
            num_workers=resources.workers if fixed else (resources.min_workers, resources.workers),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, "GPU": gpus},
        ),
        run_config=RunConfig(
            # A name of its own for every attempt: Ray takes a known name for a run to be taken up.
            name=f"{place.run_key}-{time.time_ns()}",
            storage_path=str(place.ray),
            failure_config=FailureConfig(max_failures=cluster.retries),
        ),
        torch_config=TorchConfig(timeout_s=1800),  # NCCL with GPUs, else gloo
    )
    error = run_in_thread(trainer.fit, "ray-train", look)
    if place.failure.exists():
        message = place.failure.read_text()
        place.failure.unlink()
        raise PipelineError(message)
    if error is not None:
        # Ray Train restarts its workers, but not the controller that leads them.
        why = f"stopped after {cluster.retries} restarts: {shorten_error(error)}"
        why = "lost the process that leads it" if isinstance(error, RayActorError) else why
        raise PipelineError(f"training {why}; the same command goes on from the newest checkpoint") from error


def run_in_thread(fit: Callable[[], object], name: str, look: Callable[[], object]) -> BaseException | None:
    """Run `fit` in a thread, and return the error that it raised; the main thread looks, and handles Ctrl-C."""
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        look()
    return outcome[0] if outcome else None


def release_training_group(place: Place) -> None:
    """Free the Ray resources of the last training group of a run.

    Ray does so itself, unless memory ran out and it lost the group's owner; then other trials would wait for
    those CPUs for ever.
    """
    with suppress(FileNotFoundError):
        group = PlacementGroupID.from_hex(place.placement_group.read_text())
        remove_placement_group(PlacementGroup(group))
        place.placement_group.unlink()


def _run_worker_body(body: Body, place: Place, cpus: int, image_memory: int) -> None:
    """Run the body as one worker, in the process that Ray Train started for it."""
    from ray import train
    from ray.train.torch import get_device

    if place.failure.exists():  # a peer gave up for good; this restart of the group ends at once
        return
    torch.set_num_threads(cpus)
    # What train.deterministic needs, before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    group = train.get_context()
    context = RayWorker(get_device(), cpus, group.get_world_rank(), group.get_world_size(), image_memory)
    held = get_current_placement_group()
    if context.rank == 0 and held is not None:
        write_text(place.placement_group, held.id.hex())
    try:
        body(context, place)
    except PipelineError as error:
        write_text(place.failure, str(error))
        raise
