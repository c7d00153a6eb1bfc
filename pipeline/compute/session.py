"""Ray for a whole command: start or join a cluster, train on it, run units on it. Bodies and units do not use Ray."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

import psutil
import ray
from ray import ObjectRef
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.compute import ray_train
from pipeline.compute.interrupt import StopRequest, shield_children
from pipeline.compute.local_ray import end_local_ray, require_ray, start_local_ray
from pipeline.compute.pool import Pool
from pipeline.compute.resources import Resources, TooLargeError, resolve_resources
from pipeline.compute.units import Body, Cost, Unit, WhenDone
from pipeline.config import ClusterConfig
from pipeline.console import format_duration, print_line
from pipeline.errors import PipelineError, hide_password, shorten_error
from pipeline.store.run import Place

START_SECONDS = 600  # to wait for the machines of a cluster that is still starting
CALL_SECONDS = 60  # for a machine to start a process and check what it sees
LIBRARIES = ("torch", "numpy", "torch-fidelity", "pillow")
FREE_SECONDS = 5  # for released CPUs and GPUs to become free


def describe_libraries() -> str:
    """Return the versions of the libraries that move numbers, on this machine."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)


class RaySession:
    """Executor on a Ray cluster: its own, or one that it joins.

    is_interrupted: called between waits; if it returns true, running units are cancelled. pixels: of a training batch.
    """

    def __init__(
        self, cluster: ClusterConfig, is_interrupted: Callable[[], bool] = lambda: False, pixels: int | None = None
    ):  # fmt: skip
        self.cluster, self.is_interrupted, self.pixels = cluster, is_interrupted, pixels
        self.costs: list[Cost] = []
        self.local_processes: set[psutil.Process] = set()
        self.count_trials: Callable[[], int] | None = None  # of a study, that share the cluster now
        self.known_libraries = {describe_libraries()}
        self.library_calls: dict[ObjectRef, str] = {}  # machines that have not answered yet

    @staticmethod
    @contextmanager
    def open_for_trial(
        cluster: ClusterConfig, resources: Resources, is_interrupted: Callable[[], bool],
        count_trials: Callable[[], int],
    ) -> Iterator[RaySession]:  # fmt: skip
        """Open a session for one trial, which trains on `resources`; its units take an equal part of the whole cluster.

        count_trials: returns how many trials share the cluster now: the last one's units take all of it.
        """
        session = RaySession(cluster, is_interrupted)
        session.count_trials = count_trials
        session._set_resources(resources)
        try:
            yield session
        finally:
            session.pool.end_idle_actors()

    def __enter__(self) -> RaySession:
        self.local_processes = _start_ray(self.cluster.ray_address)
        try:
            self._set_resources(self._wait_for_nodes())
            if self.cluster.ray_address:
                at_work = [node for node in _list_alive() if node["Resources"].get("CPU")]
                self.library_calls = _call_nodes(at_work, describe_libraries)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end_local_ray(self.local_processes)

    def _wait_for_nodes(self) -> Resources:
        """Return the command's resources; in a joined cluster, wait for nodes that are still starting."""
        for second in range(START_SECONDS if self.cluster.ray_address else 0):
            try:
                return resolve_resources(self.cluster, self.list_nodes(), self.pixels)
            except PipelineError as error:
                if isinstance(error, TooLargeError) and "KUBERNETES_SERVICE_HOST" not in os.environ:
                    raise  # on Kubernetes an autoscaler may have other machines
                if second == 0:
                    print_line(f"waiting up to {format_duration(START_SECONDS)} for more machines: {error}")
            time.sleep(1)
            if self.is_interrupted():
                raise StopRequest
        return resolve_resources(self.cluster, self.list_nodes(), self.pixels)

    def _explain_wait(self, count: int, cpus: int, gpus: float) -> None:
        """Say which resources the command waits for, because the joined cluster is full."""
        if self.cluster.ray_address is None or self.count_trials:
            return
        for _ in range(FREE_SECONDS):  # released CPUs and GPUs take a moment
            there = ray.available_resources()
            free_cpus, free_gpus = there.get("CPU", 0), there.get("GPU", 0)
            if count * cpus <= free_cpus and count * gpus <= free_gpus:
                return
            time.sleep(1)
        free = f"{free_cpus:g} CPUs and {free_gpus:g} GPUs are free; `ddpm jobs` shows who is at work"
        print_line(f"waiting for {count} x ({cpus} CPUs, {gpus:g} GPUs): {free}")

    def _set_resources(self, resources: Resources) -> None:
        self.resources = resources
        self.pool = Pool(self.cluster, resources.gpus_per_task, self._count_slots, self.must_stop)

    def must_stop(self) -> bool:
        """Return whether the command was asked to stop. Raises PipelineError if it has lost its Ray."""
        require_ray(self.local_processes)
        self._compare_libraries()
        return self.is_interrupted()

    def _compare_libraries(self) -> None:
        """Say if a machine that has answered by now has other libraries than the driver's."""
        for call in ray.wait(list(self.library_calls), timeout=0)[0] if self.library_calls else ():
            machine = self.library_calls.pop(call)
            with suppress(RayError):
                if (there := ray.get(call)) not in self.known_libraries:
                    self.known_libraries.add(there)
                    print_line(
                        f"{machine} has {there}, the driver {describe_libraries()}: numbers may differ"
                    )

    @staticmethod
    def list_nodes() -> list[tuple[int, int]]:
        found = [node["Resources"] for node in _list_alive()]
        return [(int(there.get("CPU", 0)), int(there.get("GPU", 0))) for there in found]

    def run_workers(self, body: Body, place: Place) -> None:
        """Run `body` on every worker of a training, after the pool has given back its GPUs."""
        self.pool.end_idle_actors()
        needed = self.resources
        self._explain_wait(needed.min_workers, needed.cpus_per_worker, needed.gpus_per_worker)

        watch = ray_train.LossWatch(place, needed.workers)

        def poll() -> None:
            watch.poll()
            if self.must_stop() and not (place.heartbeat.exists() and ray_train.is_group_running(place)):
                raise StopRequest  # the workers start, or are waited for: there is nothing to bring to a safe point

        ray_train.run_training_group(self.cluster, self.resources, body, place, poll)

    def run_units(self, units: Sequence[Unit], done: WhenDone) -> None:
        if not self.pool.idle:
            self._explain_wait(1, self.cluster.cpus_per_task, self.resources.gpus_per_task)
        self.pool.run_units(units, done, self.costs)

    def _count_slots(self) -> tuple[int, int]:
        """Return how many actors and how many tasks there may be at once."""
        there, per_task = ray.cluster_resources(), self.resources.gpus_per_task
        trials = self.count_trials() if self.count_trials else 1
        tasks = max(1, int(there.get("CPU", 1)) // trials // self.cluster.cpus_per_task)
        actors = min(tasks, int(there.get("GPU", 0) / trials / per_task)) if per_task else tasks
        return max(1, actors), tasks


def call_on_machines(address: str, body: Callable[..., str], *args: object) -> dict[str, str]:
    """Return what `body(*args)` returns on each machine of the cluster at `address`, by its name; or why it failed."""
    _start_ray(address)
    try:
        answers = {}
        for call, name in _call_nodes(_list_alive(), body, *args).items():
            try:
                answers[name] = ray.get(call, timeout=CALL_SECONDS)
            except RayError as error:
                answers[name] = shorten_error(error)
        return answers
    finally:
        ray.shutdown()


def _list_alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _call_nodes(nodes: list[dict[str, Any]], body: Callable[..., str], *args: object) -> dict[ObjectRef, str]:
    """Call `body(*args)` on each machine; return the machines by the calls."""
    calls = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        call = ray.remote(body).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(*args)
        calls[call] = ray_train.name_node(node)
    return calls


def _start_ray(address: str | None) -> set[psutil.Process]:
    """Start Ray on this machine and return its processes, or join the cluster at `address`."""
    # Workers print the same line many times over.
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    try:
        if address is None:
            return start_local_ray()
        hook = {"worker_process_setup_hook": _set_network_interface}
        with shield_children():  # from Ray's own handlers of signals
            ray.init(address=address, runtime_env=hook, logging_level=logging.ERROR, log_to_driver=False)
        return set()
    except (OSError, RuntimeError, ValueError) as error:
        safe_address = hide_password(address or "")
        where = f"the cluster at cluster.ray_address={safe_address}" if address else "Ray on this machine"
        whole = "Version mismatch" in str(error)  # its message has several lines
        reason = " ".join(str(error).split()) if whole else shorten_error(error)
        reason = reason.replace(address or where, safe_address)
        if address is None:
            reason += "; RAY_TMPDIR must be a short path of a folder that can be written"
        raise PipelineError(f"{where} cannot be reached or started: {reason}") from error


def _set_network_interface() -> None:
    """Set the network interface for gloo and NCCL, unless the host's environment names one.

    Gloo would look up the host's own name, often a loopback address; NCCL takes the first interface that it likes.
    """
    here = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if here in (address.address for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
