"""Training on several workers by Ray Train and torch.distributed."""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import PlacementGroupID
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.placement_group import placement_group_table as read_group
from ray.util.placement_group import remove_placement_group as remove_group
from torch import nn

from pipeline.compute.interrupt import StopRequest
from pipeline.compute.resources import Resources
from pipeline.compute.units import GIB, Body, Value, Worker
from pipeline.config import ClusterConfig
from pipeline.console import print_line
from pipeline.errors import PipelineError, TransientError, shorten_error
from pipeline.store.files import write_text
from pipeline.store.run import Place, list_steps

POLL_SECONDS = 0.5
RESIZE_SECONDS = 300.0  # between looks for more nodes: a larger group starts from the newest checkpoint
log = logging.getLogger(__name__)


class RayWorker(Worker):
    """Worker of a training group: reaches the others through torch.distributed."""

    def broadcast(self, value: Value) -> Value:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_number(self, number: int) -> int:
        sent = torch.tensor(number, device=self.device)
        torch.distributed.broadcast(sent, src=0)
        return int(sent)

    def will_lose_node(self) -> bool:
        from ray import train

        return train.get_preemption_info() is not None

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
    cluster: ClusterConfig, resources: Resources, body: Body, place: Place, poll: Callable[[], object]
) -> None:
    """Train with DDP on a group of Ray workers; a lost worker restarts it from the newest checkpoint.

    Not more than `cluster.retries` times without a new one. Raises a worker's PipelineError, and what `poll` raises.
    """
    error: BaseException | None = None
    before: list[int] | None = None
    while before != (steps := list_steps(place.train)):
        error = _run_ray_train(cluster, resources, body, place, poll)
        if place.failure.exists():
            message = place.failure.read_text()
            place.failure.unlink()
            raise PipelineError(message)
        if error is None:
            return
        before = steps
    # Ray Train restarts its workers, but not the controller that leads them.
    why = f"stopped after {cluster.retries} restarts without progress: {_find_last_log_line(place, error)}"
    why = "lost the process that leads it" if isinstance(error, RayActorError) else why
    raise PipelineError(f"training {why}; the same command continues from the newest checkpoint") from error


def _find_last_log_line(place: Place, error: BaseException | None) -> str:
    """Return the last line of the newest worker log, and the log's path; without a log, that of the error."""
    logs = sorted(place.worker_logs.glob("*.log"), key=lambda file: file.stat().st_mtime)
    lines = logs[-1].read_text(errors="replace").strip().splitlines() if logs else []
    return f"{lines[-1]} ({logs[-1]})" if lines else shorten_error(error or "")


def is_group_running(place: Place) -> bool:
    """Return whether Ray has given the newest training group all its workers, and lost none."""
    with suppress(FileNotFoundError, ValueError):
        group = PlacementGroup(PlacementGroupID.from_hex(place.placement_group.read_text()))
        return bool(read_group(group)["state"] == "CREATED")
    return False


def name_node(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


class LossWatch:
    """Says which machine a training group has lost, and which steps the next group repeats."""

    def __init__(self, place: Place, workers: int):
        self.place, self.workers = place, workers
        self.group, self.reached = "", 0
        self.nodes: list[str] = []  # of the group's workers

    def poll(self) -> None:
        with suppress(FileNotFoundError, ValueError):
            if (group := self.place.placement_group.read_text()) != self.group:
                found = read_group(PlacementGroup(PlacementGroupID.from_hex(group)))
                nodes = list(found["bundles_to_node_id"].values())
                if self.group:
                    self._print_loss(len(nodes))
                self.group, self.nodes = group, nodes
            self.reached = int(self.place.heartbeat.read_text())

    def _print_loss(self, workers: int) -> None:
        gone = [node for node in ray.nodes() if node["NodeID"] in self.nodes and not node["Alive"]]
        names = " and ".join(map(name_node, gone)) or "a worker"
        start = max(list_steps(self.place.train), default=0)
        grows = workers > len(self.nodes) and not gone
        why = "more machines have joined" if grows else f"{names} was lost"
        steps = f"{max(0, self.reached - start)} steps from step {start}"
        print_line(f"{why}: {steps} are repeated, by {workers} of {self.workers} workers")


def _run_ray_train(
    cluster: ClusterConfig, resources: Resources, body: Body, place: Place, poll: Callable[[], object]
) -> BaseException | None:
    """Run Ray Train to its end; return the error that ended it."""
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import ScalingConfig  # ray.train's own, with its types

    # Seconds between Ray Train's looks at the group; by default it sees two seconds late that training has ended.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    place.failure.unlink(missing_ok=True)
    release_training_group(place)  # of a controller that was killed; Ray may hold its CPUs for ever
    shutil.rmtree(place.ray, ignore_errors=True)
    cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    fixed = resources.min_workers == resources.workers
    trainer = TorchTrainer(
        partial(_run_worker_body, body, place, cpus, int(cluster.image_memory * GIB)),
        scaling_config=ScalingConfig(
            num_workers=resources.workers if fixed else (resources.min_workers, resources.workers),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, "GPU": gpus},
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            # Each attempt has its own name: Ray would resume a run whose name it knows.
            name=f"{place.run_key}-{time.time_ns()}",
            storage_path=str(place.ray),
            failure_config=FailureConfig(max_failures=cluster.retries),
        ),
        torch_config=TorchConfig(timeout_s=1800),  # NCCL with GPUs, else gloo
    )
    return run_in_thread(trainer.fit, "ray-train", poll)


def run_in_thread(fit: Callable[[], object], name: str, poll: Callable[[], object]) -> BaseException | None:
    """Run `fit` in a thread, and return its error; meanwhile the main thread calls `poll` and handles Ctrl-C."""
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            poll()
    except StopRequest:
        _end_wait(thread)
        raise
    return outcome[0] if outcome else None


def _end_wait(thread: threading.Thread) -> None:
    """End the controller that the thread waits for: a wait that is longer than Ray's life ends in a SIGSEGV."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if isinstance(controller := frame.f_locals.get("controller"), ActorHandle):
            ray.kill(controller)
            thread.join(10)
            return
        frame = frame.f_back


def release_training_group(place: Place) -> None:
    """Free the CPUs of a run's last training group; Ray may keep them if it has lost the group's owner."""
    with suppress(FileNotFoundError):
        group = PlacementGroupID.from_hex(place.placement_group.read_text())
        remove_group(PlacementGroup(group))
        place.placement_group.unlink()


def _run_worker_body(body: Body, place: Place, cpus: int, image_memory: int) -> None:
    """Run the body as one worker, in the process that Ray Train started for it."""
    from ray import train
    from ray.train.torch import get_device

    if place.failure.exists():  # another worker has given up; this restart of the group ends at once
        return
    torch.set_num_threads(cpus)
    # What train.deterministic needs, before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    group = train.get_context()
    context = RayWorker(get_device(), cpus, group.get_world_rank(), group.get_world_size(), image_memory)
    held = get_current_placement_group()
    if context.rank == 0 and held is not None:
        write_text(place.placement_group, held.id.hex())
    _log_to_file(place.worker_logs / f"rank-{context.rank}.log")
    log.warning("rank %d of %d begins on %s", context.rank, context.world_size, socket.gethostname())
    try:
        body(context, place)
    except BaseException as error:
        log.warning("this worker ends", exc_info=True)
        if isinstance(error, PipelineError) and not isinstance(error, TransientError):
            write_text(place.failure, str(error))
        raise


def _log_to_file(path: Path) -> None:
    """Append the log and the crashes of this process to a file of the run; Ray's own files are lost with the node."""
    path.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    faulthandler.enable(handler.stream or 2)
