"""How many trials run at once on a cluster, and the resources of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.compute.resources import Resources
from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError

Nodes = Sequence[tuple[int, int]]  # CPUs and GPUs of each machine


@dataclass(frozen=True)
class TrialSlots:
    """Number of trials at once, and the resources of each."""

    slots: int
    resources: Resources

    def __str__(self) -> str:
        one = self.resources
        gpus = f" and {one.gpus_per_worker:g} GPU" if one.gpus_per_worker else ""
        workers = f"{one.workers} worker{'s' if one.workers > 1 else ''}"
        return f"{self.slots} at a time, each {workers} with {one.cpus_per_worker} CPU{gpus}"


def divide_cluster(cluster: ClusterConfig, nodes: Nodes, trials: int, concurrent: int | None) -> TrialSlots:
    """Divide the cluster's CPUs and GPUs among the trials. Raises PipelineError if not even one has room.

    A trial has one worker unless the cluster file says otherwise, and a worker one GPU where there are any.
    """
    cpus, gpus = (sum(counts) for counts in zip(*nodes, strict=True))
    workers = cluster.workers or 1
    per_gpu = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(gpus > 0)

    def count_trials(per_cpu: int) -> int:
        """Return how many trials fit on the nodes; a worker stays on one node."""
        room = [min(own // per_cpu, int(its / per_gpu + 1e-9) if per_gpu else own) for own, its in nodes]
        return min(max(1, trials), concurrent or max(1, trials), sum(room) // workers)

    at_once = max(1, count_trials(1))
    per_cpu = cluster.cpus_per_worker or max(1, min(cpus // (at_once * workers), max(nodes)[0]))
    slots = count_trials(per_cpu)
    if slots < 1:
        asks = f"one trial asks for {workers} workers with {per_cpu} CPUs and {per_gpu:g} GPUs each"
        remedy = "lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker"
        raise PipelineError(f"{asks}, the cluster has {cpus} CPUs and {gpus} GPUs: {remedy}")
    least = min(cluster.min_workers or workers, workers)
    per_task = cluster.gpus_per_task if cluster.gpus_per_task is not None else min(per_gpu, 1.0)
    return TrialSlots(slots, Resources(workers, least, per_cpu, per_gpu, per_task))
