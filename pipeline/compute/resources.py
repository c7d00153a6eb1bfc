"""The share of a cluster that a command uses."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError

Nodes = Sequence[tuple[int, int]]  # CPUs and GPUs of each machine
# Of a driver or a trial, and the controller of its training, which Ray starts beside it.
LEADER_BYTES = 1_500_000_000
CROWDED = 32 * 32**2  # pixels of a batch; with fewer a GPU is idle for most of a step


class TooLargeError(PipelineError):
    """Raised if not even one worker fits on a machine of the kind that it needs: more of them would not help."""


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs that a command uses; every value is set."""

    workers: int
    min_workers: int  # fewer than `workers`: training continues with those that are left
    cpus_per_worker: int
    gpus_per_worker: float
    gpus_per_task: float


def count_local_devices() -> tuple[int, int]:
    """Return how many CPUs and GPUs this process may use on this machine."""
    import torch

    return len(os.sched_getaffinity(0)), torch.cuda.device_count()


def list_gpu_names() -> list[str]:
    """List this machine's GPUs without opening CUDA: a GPU that only one process may use is a worker's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    command += [] if visible == "all" else ["-i", visible]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def count_fitting_workers(nodes: Nodes, cpus: int, gpus: float) -> int:
    """Return how many workers, with so many CPUs and GPUs each, fit on the machines; a worker is never split."""
    return sum(min(has // cpus, int(has_gpus / gpus + 1e-9) if gpus else has) for has, has_gpus in nodes)


def require_room(nodes: Nodes, count: int, cpus: int, gpus: float, what: str = "worker") -> None:
    """Raise PipelineError unless `count` workers fit on the machines."""
    if (fitting := count_fitting_workers(nodes, cpus, gpus)) < count:
        kinds = sorted(set(nodes))
        there = ", ".join(f"{nodes.count(one)} x {one[0]} CPUs + {one[1]} GPUs" for one in kinds)
        asked = f"{count} {what}{'s' if count > 1 else ''} with {cpus} CPUs and {gpus:g} GPUs each"
        remedy = f"lower cluster.workers, cluster.cpus_per_{what} or cluster.gpus_per_{what}"
        is_never = not fitting and any(node[bool(gpus)] for node in nodes)
        refusal = TooLargeError if is_never else PipelineError
        raise refusal(f"{asked} do not fit on the cluster's machines ({there}): {remedy}")


def _find_largest(nodes: Nodes) -> tuple[int, int]:
    """Return the CPUs and GPUs of the machine with the most GPUs; among equals, the one with the most CPUs."""
    return max(nodes, key=lambda node: node[::-1])


def share_cpus(nodes: Nodes, workers: int, gpus: float) -> int:
    """Return the most CPUs that each of `workers` can have, at most in proportion to its GPUs; at least 1."""
    all_cpus, all_gpus = _find_largest(nodes)
    shares = range(int(min(1, gpus / all_gpus) * all_cpus) if all_gpus and gpus else all_cpus, 1, -1)
    return next((cpus for cpus in shares if count_fitting_workers(nodes, cpus, gpus) >= workers), 1)


def resolve_resources(cluster: ClusterConfig, nodes: Nodes, pixels: int | None = None) -> Resources:
    """Replace null settings by what the machines have. Raises PipelineError if they have too little.

    Without cluster.workers, it uses one machine, and no more GPUs than a batch of `pixels` keeps busy.
    """
    cpus, gpus = _find_largest(nodes)
    gpus_per_worker = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(gpus > 0)
    gpus_per_task = cluster.gpus_per_task if cluster.gpus_per_task is not None else float(gpus > 0)
    places = int(gpus / gpus_per_worker) if gpus_per_worker and gpus else min(2, cpus)
    busy = pixels // CROWDED if pixels and gpus else places
    workers = cluster.workers or max(1, min(places, busy))
    min_workers = min(cluster.min_workers or workers, workers)
    per_worker = cluster.cpus_per_worker or share_cpus(nodes, workers, gpus_per_worker)
    require_room(nodes, min_workers, per_worker, gpus_per_worker)
    require_room(nodes, 1, cluster.cpus_per_task, gpus_per_task, "task")
    return Resources(workers, min_workers, per_worker, gpus_per_worker, gpus_per_task)
