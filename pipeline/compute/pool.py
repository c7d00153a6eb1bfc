"""Work units on a Ray session: a pool of actors for those that use a network, Ray tasks for the others.

An actor keeps one GPU, or one share of the CPUs, for life, and in its process the network and the extractor of
its last unit. CUDA reads once which GPUs a process may use, so a Ray task's process, which is given to another
task with another GPU, would go on computing on its first one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from pipeline.compute.costs import CostCounter
from pipeline.compute.units import Unit, WhenDone, Worker, create_local_worker
from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError, shorten_error

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
IDLE_SECONDS = 5.0
END_SECONDS = 30.0  # how long a map waits for what it has cancelled


class Actor:
    """A process of the pool."""

    def __init__(self, cpus: int):
        torch.set_num_threads(cpus)
        self.context = create_local_worker(cpus)

    def run(self, unit: Unit) -> float:
        return unit.run(self.context)


def run_task(unit: Unit, cpus: int) -> float:
    """Run a unit that uses no network, on CPUs: Ray does not hide the GPUs from a task that asked for none."""
    torch.set_num_threads(cpus)
    return unit.run(Worker(torch.device("cpu"), cpus))


@dataclass(frozen=True)
class PendingCall:
    """What is under way: a unit on an actor, an actor that starts (unit None), or a unit as a task (actor None)."""

    unit: Unit | None
    actor: ActorHandle | None


class Pool:
    """The actors of a command: a map starts those that it lacks and leaves them idle for the next one.

    limits: returns how many actors and how many tasks there may be at once; it is asked at every look, so a node
    that joins is used. interrupted: when it says yes, a map gives up what is under way and returns.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        gpus: float,
        limits: Callable[[], tuple[int, int]],
        interrupted: Callable[[], bool],
    ):
        self.cpus, self.retries = cluster.cpus_per_task, cluster.retries
        self.limits, self.interrupted = limits, interrupted
        # "DEFAULT": not in the caller's placement group, where the caller is a trial.
        self.new_actor = ray.remote(Actor).options(
            num_cpus=self.cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="DEFAULT"
        )
        self.new_task = ray.remote(run_task).options(
            num_cpus=self.cpus, num_gpus=0, max_retries=self.retries, scheduling_strategy="DEFAULT"
        )
        self.idle: list[ActorHandle] = []
        self.calls: dict[ObjectRef, PendingCall] = {}
        self.waiting: dict[bool, list[Unit]] = {}  # by whether they use a network, the next one last
        self.losses: Counter[int] = Counter()  # of processes, by the unit's id
        self.last_used = time.monotonic()
        self.lock = threading.Lock()  # held by a map

    def run_units(self, units: Sequence[Unit], done: WhenDone, costs: CostCounter) -> None:
        """Run the units, one at a time on each actor, and call `done` with each that is finished.

        A unit whose actor dies is given to another, up to `cluster.retries` times. A unit's own error ends the
        map. On every way out what is under way is cancelled.
        """
        with self.lock:
            self.waiting, self.losses = {True: [], False: []}, Counter()
            self._queue_units(reversed(units))
            try:
                while any(self.waiting.values()) or any(call.unit for call in self.calls.values()):
                    self._start_calls()
                    for reference in ray.wait(list(self.calls), timeout=POLL_SECONDS)[0]:
                        seconds, unit = self._take_result(reference), self.calls.pop(reference).unit
                        if unit and seconds is not None:
                            costs.add(unit.kind, unit.images, seconds)
                            done(unit)
                    if self.interrupted():
                        return
            finally:
                self._cancel()
                self.last_used = time.monotonic()

    def _queue_units(self, units: Iterable[Unit]) -> None:
        for unit in units:
            self.waiting[unit.needs_gpu].append(unit)

    def _start_calls(self) -> None:
        """Give idle actors a unit each, start those that are missing, and as many tasks as are allowed."""
        networks, others = self.waiting[True], self.waiting[False]
        most_actors, most_tasks = self.limits()
        tasks = sum(call.actor is None for call in self.calls.values())
        for _ in range(min(len(others), most_tasks - tasks)):
            unit = others.pop()
            self.calls[self.new_task.remote(unit, self.cpus)] = PendingCall(unit, None)
            tasks += 1
        while networks and self.idle:
            unit, actor = networks.pop(), self.idle.pop()
            self.calls[actor.run.remote(unit)] = PendingCall(unit, actor)
        starting = sum(call.unit is None for call in self.calls.values())
        for _ in range(min(len(networks) - starting, most_actors - len(self.calls) + tasks)):
            new = self.new_actor.remote(self.cpus)
            assert isinstance(new, ActorHandle)
            self.calls[new.__ray_ready__.remote()] = PendingCall(None, new)
        if tasks and self.idle and ray.available_resources().get("CPU", 0) < self.cpus:
            self._end_idle()  # a task may be waiting for what they hold

    def _take_result(self, reference: ObjectRef) -> float | None:
        """Return the seconds that a unit took, and its actor to the idle ones; None where the actor was lost.

        Raises what the unit raised, in a user's words where the user can help it.
        """
        call = self.calls[reference]
        try:
            seconds = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, PipelineError):
                raise error.cause from None
            raise
        except RayError as error:
            name = f"'{call.unit.name}'" if call.unit else "a process for work units"
            self.losses[id(call.unit)] += 1
            if (
                call.actor is None or self.losses[id(call.unit)] > self.retries
            ):  # Ray has tried a task as often
                raise PipelineError(
                    f"{name} lost its process again and again ({shorten_error(error)}); the same command goes on here"
                ) from error
            log.warning("%s lost its process (%s); another takes its place", name, shorten_error(error))
            ray.kill(call.actor)  # it may be out of reach only
            self._queue_units([call.unit] if call.unit else [])
            return None
        self.idle += [call.actor] if call.actor else []
        return seconds

    def _cancel(self) -> None:
        """End the units that are under way, and wait until they have ended."""
        calls = {ref: call for ref, call in self.calls.items() if call.unit}
        for ref, call in calls.items():
            if call.actor is None:
                ray.cancel(ref, force=True)
            else:
                ray.kill(call.actor)
        if calls:
            ray.wait(list(calls), num_returns=len(calls), timeout=END_SECONDS)
        self.calls = {ref: call for ref, call in self.calls.items() if ref not in calls}

    def _end_idle(self) -> None:
        """End the actors that have no unit, those that are starting too."""
        starting = {ref: call.actor for ref, call in self.calls.items() if call.actor and not call.unit}
        for actor in [*self.idle, *starting.values()]:
            ray.kill(actor)
        self.idle = []
        self.calls = {ref: call for ref, call in self.calls.items() if ref not in starting}

    def end(self) -> None:
        """End the actors, once no map is under way: Ray gives their GPUs to others when their processes are gone."""
        with self.lock:
            self._end_idle()

    def end_idle_actors(self) -> None:
        """End actors that were idle for a while; a training group that lost a node may need their place."""
        if time.monotonic() - self.last_used > IDLE_SECONDS and self.lock.acquire(blocking=False):
            self._end_idle()
            self.lock.release()
