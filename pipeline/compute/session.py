"""Ray for a whole command: start or join a cluster, train on it, map work units over it.

Bodies and units never see Ray; they get a WorkerContext.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch

from pipeline.compute import training
from pipeline.compute.resources import Resources, resolve
from pipeline.compute.spent import Spent
from pipeline.compute.work import Body, Done, Unit, local_context
from pipeline.config import ClusterConfig, Experiment
from pipeline.errors import PipelineError, last_line
from pipeline.store.run import Place

POLL_SECONDS = 0.5


class Session:
    """A Ray cluster of its own, or a connection to one; an Executor (`pipeline.compute.work`).

    `interrupted` is asked between waits: when it says yes, work that is under way is given up.
    """

    def __init__(self, cluster: ClusterConfig, interrupted: Callable[[], bool] = lambda: False):
        self.cluster, self.interrupted, self.spent = cluster, interrupted, Spent()
        self.most_in_flight: int | None = None  # units; None: enough to keep every CPU busy

    @staticmethod
    def within(cluster: ClusterConfig, resources: Resources, interrupted: Callable[[], bool]) -> Session:
        """Return the share of a trial in a session that its process has joined already: `resources` and no more."""
        session = Session(cluster, interrupted)
        session.resources = resources
        session.most_in_flight = resources.tasks_at_once(cluster.cpus_per_task)
        return session

    def __enter__(self) -> Session:
        _start_ray(self.cluster.ray_address)
        import ray

        try:
            there = ray.cluster_resources()
            most = max(cpus for cpus, _ in self.nodes())
            self.resources = resolve(self.cluster, int(there.get("CPU", 0)), int(there.get("GPU", 0)), most)
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def nodes(self) -> list[tuple[int, int]]:
        """Return (CPUs, GPUs) of each machine."""
        import ray

        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [(int(there.get("CPU", 0)), int(there.get("GPU", 0))) for there in found]

    @property
    def spare(self) -> int:
        return self.resources.spare

    def run_workers(self, body: Body, experiment: Experiment, run: Place) -> None:
        """Train with DDP (`pipeline.compute.training`)."""
        training.run_group(self.cluster, self.resources, body, experiment, run)

    def map_units(self, units: Sequence[Unit], done: Done) -> None:
        """Run the units as Ray tasks, a bounded number in flight; lost tasks are repeated by Ray. What can be
        done after a unit comes before the units that still wait."""
        import ray

        task = ray.remote(_run_unit).options(
            num_cpus=self.cluster.cpus_per_task,
            num_gpus=self.resources.gpus_per_task,
            max_retries=self.cluster.retries,
            scheduling_strategy="DEFAULT",  # not in the caller's placement group, where the caller is a trial
        )
        waiting = list(reversed(units))
        in_flight: dict[ray.ObjectRef, Unit] = {}
        everywhere = int(ray.cluster_resources().get("CPU", 1)) // self.cluster.cpus_per_task
        slots = self.most_in_flight or 2 * max(1, everywhere)
        while waiting or in_flight:
            while waiting and len(in_flight) < slots:
                unit = waiting.pop()
                in_flight[task.remote(unit, self.cluster.cpus_per_task)] = unit
            finished, _ = ray.wait(list(in_flight), timeout=POLL_SECONDS)
            for reference in finished:
                unit = in_flight.pop(reference)
                self.spent.add(unit.kind, unit.images, _result(reference, unit))
                waiting += done(unit) or ()
            if self.interrupted():
                for reference in in_flight:
                    ray.cancel(reference, force=True)
                return


def _result(reference, unit: Unit) -> float:
    """The seconds that the unit took; or raise what it raised, in a user's words where the user can help it."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise PipelineError(
            f"'{unit.name}' lost its process again and again ({last_line(error)}); the same command goes on here"
        ) from error


def _run_unit(unit: Unit, cpus: int) -> float:
    torch.set_num_threads(cpus)
    return unit.run(local_context(cpus))


def _start_ray(address: str | None) -> None:
    import ray

    # Workers print the same line many times over.
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    try:
        if address is None:
            # "local": never somebody else's cluster that happens to run here. The dashboard of a cluster that ends
            # with the command would cost two seconds of every start.
            cpus = len(os.sched_getaffinity(0))
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False,
                logging_level=logging.ERROR, log_to_driver=False,
            )  # fmt: skip
        else:
            hook = {"worker_process_setup_hook": _name_interface}
            ray.init(address=address, runtime_env=hook, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        where = (
            f"the cluster at cluster.ray_address={address}" if address else "a Ray cluster on this machine"
        )
        whole = "Version mismatch" in str(error)  # told over several lines
        reason = " ".join(str(error).split()) if whole else last_line(error)
        raise PipelineError(f"{where} cannot be reached or started: {reason}") from error


def _name_interface() -> None:
    """Tell gloo and NCCL the interface by which the hosts of this cluster know each other.

    Gloo looks up the host's own name, which many hosts give a loopback address, and then waits for peers that
    cannot reach it; NCCL takes the first interface that it likes. What the host's environment says comes first.
    """
    import psutil
    import ray

    here = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if here in (address.address for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
