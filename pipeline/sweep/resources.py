"""How many trials run at once, and what each may use: never more than there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.compute.resources import Resources
from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError


class Node(NamedTuple):
    """What one machine of the cluster offers."""

    cpus: int
    gpus: int

    def places(self, cpus: int, gpus: float) -> int:
        """Return how many workers of that size it has room for."""
        by_cpu = self.cpus // cpus
        return min(by_cpu, int(self.gpus / gpus + 1e-9)) if gpus else by_cpu


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


def list_local_nodes() -> list[Node]:
    """Return this machine, as a cluster of one."""
    import torch

    return [Node(len(os.sched_getaffinity(0)), torch.cuda.device_count())]


def share_cluster(
    cluster: ClusterConfig, nodes: Sequence[Node], trials: int, concurrent: int | None
) -> Share:
    """Give each trial one worker unless the cluster says otherwise, each worker a GPU where there are any, and
    divide the CPUs among the trials that run at once.

    Raises PipelineError where not even one trial has room.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    workers = cluster.workers or 1
    per_gpu = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(gpus > 0)
    wanted = min(trials, concurrent or trials)
    by_gpu = sum(node.places(1, per_gpu) for node in nodes) // workers
    at_once = max(1, min(wanted, by_gpu))
    largest = max(node.cpus for node in nodes)
    per_cpu = cluster.cpus_per_worker or max(1, min(cpus // (at_once * workers), largest))
    slots = min(wanted, sum(node.places(per_cpu, per_gpu) for node in nodes) // workers)
    if slots < 1:
        raise PipelineError(
            f"one trial asks for {workers} workers with {per_cpu} CPUs and {per_gpu:g} GPUs each, the cluster has "
            f"{cpus} CPUs and {gpus} GPUs: lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker"
        )
    least = min(cluster.min_workers or workers, workers)
    per_task = cluster.gpus_per_task if cluster.gpus_per_task is not None else min(per_gpu, 1.0)
    return Share(slots, Resources(workers, least, per_cpu, per_gpu, per_task, spare=0))
