"""The pool of a command: Ray actors for the units that use a network, Ray tasks for the others.

An actor keeps its GPU or CPUs, and the network of its last unit, until it ends. CUDA reads only once which GPUs a
process may use. Ray may use a task's process again for another GPU, but the process would keep the first one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from pipeline.compute.units import Cost, Unit, WhenDone, Worker, create_local_worker
from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError, TransientError, shorten_error
from pipeline.store.files import TRANSIENT

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
END_SECONDS = 30.0  # to wait for cancelled units


class Actor:
    """Ray actor of the pool: a process that runs units on one GPU or some CPUs."""

    def __init__(self, cpus: int):
        torch.set_num_threads(cpus)
        self.worker = create_local_worker(cpus)

    def run(self, unit: Unit) -> float:
        return unit.run(self.worker)


def run_task(unit: Unit, cpus: int) -> float:
    """Run a unit that uses no network, on CPUs: Ray does not hide the GPUs from a task that asked for none."""
    torch.set_num_threads(cpus)
    return unit.run(Worker(torch.device("cpu"), cpus))


def is_transient(error: object) -> bool:
    """Return whether a unit's error, of storage or device, may be absent when another process tries again."""
    is_storage = isinstance(error, OSError) and error.errno in TRANSIENT
    return is_storage or isinstance(error, TransientError) or "CUDA error" in str(error)


@dataclass(frozen=True)
class PendingCall:
    """A Ray call that has not returned. unit: None if it starts an actor; actor: None if the unit is a task."""

    unit: Unit | None
    actor: ActorHandle | None


class Pool:
    """Actors of one command; they are started when needed and reused.

    limits: returns how many actors and tasks there may be at once, now. is_interrupted: whether to cancel units.
    """

    def __init__(
        self, cluster: ClusterConfig, gpus: float, limits: Callable[[], tuple[int, int]],
        is_interrupted: Callable[[], bool],
    ):  # fmt: skip
        self.cpus, self.retries = cluster.cpus_per_task, cluster.retries
        self.limits, self.is_interrupted = limits, is_interrupted
        self.new_actor = ray.remote(Actor).options(num_cpus=self.cpus, num_gpus=gpus, max_restarts=0)
        self.new_task = ray.remote(run_task).options(num_cpus=self.cpus, num_gpus=0, max_retries=self.retries)
        self.idle: list[ActorHandle] = []
        self.calls: dict[ObjectRef, PendingCall] = {}
        self.waiting: dict[bool, list[Unit]] = {}  # by whether they use a network, the next one last
        self.losses: Counter[int] = Counter()  # of processes, by the unit's id

    def run_units(self, units: Sequence[Unit], done: WhenDone, costs: list[Cost]) -> None:
        """Run the units, one at a time on each actor, and call `done` with each finished unit.

        A unit whose process dies, or that has a transient error, is done again at once, `cluster.retries` times.
        """
        self.losses = Counter()
        self.waiting = {kind: [u for u in reversed(units) if u.needs_gpu == kind] for kind in (True, False)}
        try:
            while any(self.waiting.values()) or any(call.unit for call in self.calls.values()):
                self._start_calls()
                for reference in ray.wait(list(self.calls), timeout=POLL_SECONDS)[0]:
                    seconds, unit = self._take_result(reference), self.calls.pop(reference).unit
                    if unit and seconds is not None:
                        costs.append((unit.kind, unit.images, seconds))
                        done(unit)
                if self.is_interrupted():
                    return
        finally:
            self._cancel()

    def _start_calls(self) -> None:
        """Start missing actors, and units on idle actors or as tasks, up to the limits."""
        networks, others = self.waiting[True], self.waiting[False]
        while self.idle and (units := networks or others):  # a new process would import torch again
            unit, actor = units.pop(), self.idle.pop()
            self.calls[actor.run.remote(unit)] = PendingCall(unit, actor)
        most_actors, most_tasks = self.limits()
        tasks = sum(call.actor is None for call in self.calls.values())
        for _ in range(min(len(others), most_tasks - tasks)):
            unit = others.pop()
            self.calls[self.new_task.remote(unit, self.cpus)] = PendingCall(unit, None)
            tasks += 1
        starting = sum(call.unit is None for call in self.calls.values())
        for _ in range(min(len(networks) - starting, most_actors - len(self.calls) + tasks)):
            new = self.new_actor.remote(self.cpus)
            assert isinstance(new, ActorHandle)
            self.calls[new.__ray_ready__.remote()] = PendingCall(None, new)
        if tasks and self.idle and ray.available_resources().get("CPU", 0) < self.cpus:
            self.end_idle_actors()  # a task may be waiting for their CPUs or GPUs

    def _take_result(self, reference: ObjectRef) -> float | None:
        """Return the seconds of a finished unit and mark its actor as idle; None if the actor died.

        Raises the unit's error, with a remedy if the user can do something.
        """
        call = self.calls[reference]
        try:
            seconds = ray.get(reference)
        except RayError as error:
            if isinstance(error, RayTaskError) and not is_transient(error.cause):
                raise error.cause if isinstance(error.cause, PipelineError) else error from None
            name = f"'{call.unit.name}'" if call.unit else "a process for work units"
            self.losses[id(call.unit)] += 1
            # Ray itself starts a task again that lost its process.
            what = "failed" if isinstance(error, RayTaskError) else "lost its process"
            is_lost_task = call.actor is None and not isinstance(error, RayTaskError)
            if is_lost_task or self.losses[id(call.unit)] > self.retries:
                problem = f"{name} {what} again and again ({shorten_error(error)})"
                raise PipelineError(f"{problem}; the same command continues here") from error
            log.warning("%s %s (%s); another takes its place", name, what, shorten_error(error))
            if call.actor:
                ray.kill(call.actor)  # perhaps it cannot be reached, or has lost its device
            if call.unit:
                self.waiting[call.unit.needs_gpu].append(call.unit)
            return None
        self.idle += [call.actor] if call.actor else []
        return seconds

    def _cancel(self) -> None:
        """Cancel the units that still run, and wait until they have ended."""
        running = {ref: call for ref, call in self.calls.items() if call.unit}
        for ref, call in running.items():
            if call.actor is None:
                ray.cancel(ref, force=True)
            else:
                ray.kill(call.actor)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=END_SECONDS)
        self.calls = {ref: call for ref, call in self.calls.items() if ref not in running}

    def end_idle_actors(self) -> None:
        """End all actors that run no unit, also starting ones, so that Ray can give their GPUs to others."""
        starting = {ref: call.actor for ref, call in self.calls.items() if call.actor and not call.unit}
        for actor in [*self.idle, *starting.values()]:
            ray.kill(actor)
        self.idle = []
        self.calls = {ref: call for ref, call in self.calls.items() if ref not in starting}
