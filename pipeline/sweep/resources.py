"""How many trials run at once, and what each may use: never more than there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.compute.resources import Resources
from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError

Nodes = Sequence[tuple[int, int]]  # CPUs and GPUs of each machine


@dataclass(frozen=True)
class Share:
    """slots: trials at once; resources: what each of them may use."""

    slots: int
    resources: Resources

    def __str__(self) -> str:
        one = self.resources
        gpus = f" and {one.gpus_per_worker:g} GPU" if one.gpus_per_worker else ""
        workers = f"{one.workers} worker{'s' if one.workers > 1 else ''}"
        return f"{self.slots} at a time, each {workers} with {one.cpus_per_worker} CPU{gpus}"


def list_local_nodes() -> Nodes:
    """Return this machine, as a cluster of one."""
    import torch

    return [(len(os.sched_getaffinity(0)), torch.cuda.device_count())]


def count_fitting_workers(nodes: Nodes, cpus: int, gpus: float) -> int:
    """Return how many workers of that size the machines have room for."""
    return sum(min(there // cpus, int(own / gpus + 1e-9)) if gpus else there // cpus for there, own in nodes)


def share_cluster(cluster: ClusterConfig, nodes: Nodes, trials: int, concurrent: int | None) -> Share:
    """Give each trial one worker unless the cluster says otherwise, each worker a GPU where there are any, and
    divide the CPUs among the trials that run at once.

    Raises PipelineError where not even one trial has room.
    """
    cpus, gpus = (sum(counts) for counts in zip(*nodes, strict=True))
    workers = cluster.workers or 1
    per_gpu = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(gpus > 0)
    wanted = min(trials, concurrent or trials)
    at_once = max(1, min(wanted, count_fitting_workers(nodes, 1, per_gpu) // workers))
    per_cpu = cluster.cpus_per_worker or max(1, min(cpus // (at_once * workers), max(nodes)[0]))
    slots = min(wanted, count_fitting_workers(nodes, per_cpu, per_gpu) // workers)
    if slots < 1:
        raise PipelineError(
            f"one trial asks for {workers} workers with {per_cpu} CPUs and {per_gpu:g} GPUs each, the cluster has "
            f"{cpus} CPUs and {gpus} GPUs: lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker"
        )
    least = min(cluster.min_workers or workers, workers)
    per_task = cluster.gpus_per_task if cluster.gpus_per_task is not None else min(per_gpu, 1.0)
    return Share(slots, Resources(workers, least, per_cpu, per_gpu, per_task))
