"""Shares of a cluster: how many trials run at once, and the resources of each."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.compute.resources import Nodes, Resources, count_fitting_workers, require_room, share_cpus
from pipeline.config import ClusterConfig


@dataclass(frozen=True)
class TrialSlots:
    """The number of trials that fit at once on the machines of the start; `most` is their limit at any time."""

    slots: int
    resources: Resources
    most: int

    def count_slots(self, nodes: Nodes) -> int:
        """Return how many trials fit at once on these machines, which may have joined later."""
        one = self.resources
        fitting = count_fitting_workers(nodes, one.cpus_per_worker, one.gpus_per_worker) // one.workers
        return max(1, min(self.most, fitting))

    def __str__(self) -> str:
        one = self.resources
        gpus = f" and {one.gpus_per_worker:g} GPU" if one.gpus_per_worker else ""
        workers = f"{one.workers} worker{'s' if one.workers > 1 else ''}"
        return f"{self.slots} at a time, each {workers} with {one.cpus_per_worker} CPU{gpus}"


def divide_cluster(cluster: ClusterConfig, nodes: Nodes, trials: int, concurrent: int | None) -> TrialSlots:
    """Divide the cluster's CPUs and GPUs among the trials. Raises PipelineError if not even one has room.

    A trial has one worker unless the cluster file says otherwise, and a worker one GPU if there are any.
    """
    workers = cluster.workers or 1
    has_gpus = any(gpus for _, gpus in nodes)
    per_gpu = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(has_gpus)
    wanted = max(1, trials)
    most = min(wanted, concurrent or wanted)
    slots = min(most, count_fitting_workers(nodes, 1, per_gpu) // workers)
    per_cpu = cluster.cpus_per_worker or share_cpus(nodes, max(1, slots) * workers, per_gpu)
    require_room(nodes, workers, per_cpu, per_gpu)
    slots = min(most, count_fitting_workers(nodes, per_cpu, per_gpu) // workers)
    least = min(cluster.min_workers or workers, workers)
    per_task = cluster.gpus_per_task if cluster.gpus_per_task is not None else min(per_gpu, 1.0)
    return TrialSlots(slots, Resources(workers, least, per_cpu, per_gpu, per_task), most)
