"""The share of a cluster that a command uses."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs that a command uses; every value is set."""

    workers: int
    min_workers: int  # fewer than `workers`: training goes on with what is left
    cpus_per_worker: int
    gpus_per_worker: float
    gpus_per_task: float

    def count_tasks(self, cpus_per_task: int) -> int:
        """Return how many tasks run at once on the CPUs of the workers; at least one."""
        by_cpu = self.workers * self.cpus_per_worker // cpus_per_task
        if not self.gpus_per_task:
            return max(1, by_cpu)
        return max(1, min(by_cpu, int(self.workers * self.gpus_per_worker / self.gpus_per_task)))


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


def resolve_resources(
    cluster: ClusterConfig, cpus: int, gpus: int, node_cpus: int | None = None
) -> Resources:
    """Replace null settings by what the cluster has. Raises PipelineError where it has too little.

    node_cpus: those of the largest node; no worker and no task can have more.
    """
    most = cpus if node_cpus is None else node_cpus
    workers = cluster.workers or gpus or min(2, cpus)
    min_workers = min(cluster.min_workers or workers, workers)
    per_worker = cluster.cpus_per_worker or max(1, min(cpus // workers, most))
    gpus_per_worker = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(gpus > 0)
    gpus_per_task = cluster.gpus_per_task if cluster.gpus_per_task is not None else float(gpus > 0)
    too_few = f"{min_workers} workers ask for %g %s, the cluster has %d: lower cluster.workers or %s"
    for key, asked, there, name in (
        ("cluster.cpus_per_worker", min_workers * per_worker, cpus, "CPUs"),
        ("cluster.gpus_per_worker", min_workers * gpus_per_worker, gpus, "GPUs"),
    ):
        if asked > there:
            raise PipelineError(too_few % (asked, name, there, key))
    for key, asked, there in (
        ("cluster.cpus_per_worker", per_worker, most),
        ("cluster.cpus_per_task", cluster.cpus_per_task, most),
        ("cluster.gpus_per_task", gpus_per_task, gpus),
    ):
        if asked > there:
            raise PipelineError(f"{key}={asked:g}, but no machine has more than {there}: lower it")
    return Resources(workers, min_workers, per_worker, gpus_per_worker, gpus_per_task)
