"""The only room that knows Ray: start or join a cluster, train with DDP on it, map work units over it.

One session serves a whole command. Bodies and units never see Ray; they get a WorkerContext.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.compute.work import GIB, Done, Spent, Unit, WorkerContext, local_context
from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError
from pipeline.store.files import write_text
from pipeline.store.run import Place

POLL_SECONDS = 0.5


class Peer(WorkerContext):
    """A worker of a training group: its doors lead through torch.distributed and Ray Train."""

    def broadcast(self, value: Any) -> Any:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def decide(self, flag: bool) -> bool:
        decision = torch.tensor(int(flag), device=self.device)
        torch.distributed.broadcast(decision, src=0)
        return bool(decision)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        summed = value.clone()
        torch.distributed.all_reduce(summed)
        return summed

    def parallel(self, net: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return net
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=devices, broadcast_buffers=False)

    def report(self, step: int) -> None:
        from ray import train

        if self.rank > 0:
            train.report({"step": step})
            return
        with tempfile.TemporaryDirectory() as folder:
            # A pointer only: Ray copies in place and calls a run corrupted whose registered folder vanished,
            # so the step folders in the run directory stay the authority.
            (Path(folder) / "step").write_text(str(step))
            train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(folder))


@dataclass(frozen=True)
class Resources:
    """What a session was promised, nulls resolved."""

    workers: int
    min_workers: int  # fewer than `workers`: training goes on with what is left
    cpus_per_worker: int
    gpus_per_worker: float
    gpus_per_task: float
    spare: int  # tasks that fit beside all workers

    def tasks_at_once(self, cpus_per_task: int) -> int:
        """How many tasks fit into what the workers hold; at least one."""
        by_cpu = self.workers * self.cpus_per_worker // cpus_per_task
        by_gpu = (
            int(self.workers * self.gpus_per_worker / self.gpus_per_task) if self.gpus_per_task else by_cpu
        )
        return max(1, min(by_cpu, by_gpu))


def resolve(cluster: ClusterConfig, cpus: int, gpus: int, cpus_per_node: int | None = None) -> Resources:
    """Fill the nulls from what there is, and refuse at once what can never be scheduled.

    cpus_per_node: those of the largest node; no worker and no task can have more.
    """
    most = cpus if cpus_per_node is None else cpus_per_node
    workers = cluster.workers or gpus or min(2, cpus)
    min_workers = min(cluster.min_workers or workers, workers)
    per_worker = cluster.cpus_per_worker or max(1, min(cpus // workers, most))
    gpus_per_worker = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(gpus > 0)
    gpus_per_task = cluster.gpus_per_task if cluster.gpus_per_task is not None else float(gpus > 0)
    wanted = {
        "CPUs": (min_workers * per_worker, cpus, "cluster.cpus_per_worker"),
        "GPUs": (min_workers * gpus_per_worker, gpus, "cluster.gpus_per_worker"),
    }
    for what, (asked, there, key) in wanted.items():
        if asked > there:
            raise PipelineError(
                f"{min_workers} workers ask for {asked:g} {what}, the cluster has {there}: "
                f"lower cluster.workers or {key}"
            )
    for key, asked, there in (
        ("cluster.cpus_per_worker", per_worker, most),
        ("cluster.cpus_per_task", cluster.cpus_per_task, most),
        ("cluster.gpus_per_task", gpus_per_task, gpus),
    ):
        if asked > there:
            raise PipelineError(
                f"{key}={asked:g}, but no machine of the cluster has more than {there}: lower it"
            )
    spare = (cpus - workers * per_worker) // cluster.cpus_per_task
    if gpus_per_task:
        spare = min(spare, int((gpus - workers * gpus_per_worker) / gpus_per_task))
    return Resources(workers, min_workers, per_worker, gpus_per_worker, gpus_per_task, max(0, spare))


class Session:
    """A Ray cluster of its own, or a connection to one; an Executor (`pipeline.compute.work`).

    `interrupted` is asked between waits: when it says yes, work that is under way is given up.
    """

    def __init__(self, cluster: ClusterConfig, interrupted: Callable[[], bool] = lambda: False):
        self.cluster, self.interrupted, self.spent = cluster, interrupted, Spent()
        self.most_in_flight: int | None = None  # units; None: enough to keep every CPU busy

    @staticmethod
    def within(cluster: ClusterConfig, resources: Resources, interrupted: Callable[[], bool]) -> Session:
        """The share of a trial in a session that its process has joined already: `resources` and no more."""
        session = Session(cluster, interrupted)
        session.resources = resources
        session.most_in_flight = resources.tasks_at_once(cluster.cpus_per_task)
        return session

    def __enter__(self) -> Session:
        _start_ray(self.cluster.ray_address)
        import ray

        try:
            there = ray.cluster_resources()
            most = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
            self.resources = resolve(self.cluster, int(there.get("CPU", 0)), int(there.get("GPU", 0)), most)
        except BaseException:
            ray.shutdown()
            raise
        return self

    def nodes(self) -> list[tuple[int, int]]:
        """(CPUs, GPUs) of each machine."""
        import ray

        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [(int(there.get("CPU", 0)), int(there.get("GPU", 0))) for there in found]

    def __exit__(self, *_: Any) -> None:
        import ray

        ray.shutdown()

    @property
    def spare(self) -> int:
        return self.resources.spare

    # Training

    def run_workers(self, body: Callable[..., None], experiment: Any, run: Place) -> None:
        """Train with DDP. A lost worker restarts the group from the newest checkpoint on disk, up to
        `cluster.retries` times; a PipelineError in a worker ends it and is raised here."""
        failure = run.failure
        failure.unlink(missing_ok=True)
        shutil.rmtree(run.ray, ignore_errors=True)
        error = off_the_main_thread(lambda: self._trainer(body, experiment, run, failure).fit(), "ray-train")
        if failure.exists():
            message = failure.read_text()
            failure.unlink()
            raise PipelineError(message)
        if error is not None:
            why = _why_it_ended(error, self.cluster.retries)
            raise PipelineError(f"{why}; the same command goes on from the newest checkpoint") from error

    def _trainer(self, body: Callable[..., None], experiment: Any, run: Place, failure: Path) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        # Seconds between Ray Train's looks at the group; by default it sees two seconds late that training has ended.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        use_gpu = self.resources.gpus_per_worker > 0
        per_worker = {"CPU": float(self.resources.cpus_per_worker)}
        if use_gpu:
            per_worker["GPU"] = self.resources.gpus_per_worker
        return TorchTrainer(
            _train_worker,
            train_loop_config={
                "body": body, "experiment": experiment, "run": run,
                "failure": failure, "cpus": self.resources.cpus_per_worker,
                "image_memory": int(self.cluster.image_memory * GIB),
            },
            scaling_config=ScalingConfig(
                num_workers=_fixed_or_elastic(self.resources), use_gpu=use_gpu, resources_per_worker=per_worker
            ),
            run_config=RunConfig(
                # A name of its own for every attempt: Ray takes a known name for a run to be taken up.
                name=f"{run.run_key}-{time.time_ns()}",
                storage_path=str(run.ray),
                failure_config=FailureConfig(max_failures=self.cluster.retries),
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=1800),
        )  # fmt: skip

    # Work units

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
        in_flight: dict[Any, Unit] = {}
        everywhere = int(ray.cluster_resources().get("CPU", 1)) // self.cluster.cpus_per_task
        slots = self.most_in_flight or 2 * max(1, everywhere)
        while waiting or in_flight:
            while waiting and len(in_flight) < slots:
                unit = waiting.pop()
                in_flight[task.remote(unit, self.cluster.cpus_per_task)] = unit
            finished, _ = ray.wait(list(in_flight), timeout=POLL_SECONDS)
            for reference in finished:
                unit = in_flight.pop(reference)
                self.spent.add(unit, _result(reference, unit))
                waiting += done(unit) or ()
            if self.interrupted():
                for reference in in_flight:
                    ray.cancel(reference, force=True)
                return


def off_the_main_thread(fit: Callable[[], Any], name: str) -> BaseException | None:
    """Run what would replace the handling of Ctrl-C on the main thread, which waits and stays free for it;
    returns what it raised."""
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
    return outcome[0] if outcome else None


def _why_it_ended(error: BaseException, retries: int) -> str:
    """Ray Train restarts its workers, but not the controller that leads them."""
    from ray.exceptions import RayActorError

    if isinstance(error, RayActorError):
        return "training lost the process that leads it"
    return f"training stopped after {retries} restarts: {last_line(error)}"


def _fixed_or_elastic(resources: Resources) -> Any:
    """What Ray Train takes: a number of workers, or the least and the most."""
    if resources.min_workers == resources.workers:
        return resources.workers
    return resources.min_workers, resources.workers


def _start_ray(address: str | None) -> None:
    import ray

    # Workers print the same line many times over.
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is None:
            # "local": never somebody else's cluster that happens to run here. The dashboard of a cluster that ends
            # with the command would cost two seconds of every start.
            cpus = len(os.sched_getaffinity(0))
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, runtime_env={"worker_process_setup_hook": _name_interface}, **quiet)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        where = (
            f"the cluster at cluster.ray_address={address}" if address else "a Ray cluster on this machine"
        )
        whole = "Version mismatch" in str(error)  # told over several lines
        reason = " ".join(str(error).split()) if whole else last_line(error)
        raise PipelineError(f"{where} cannot be reached or started: {reason}") from error


def last_line(error: BaseException) -> str:
    """What the error says last, or, where memory ran short, how short: the advice that Ray adds fills a screen."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    short = [line for line in lines if "running low on memory" in line]
    return (short or lines[-1:] or [type(error).__name__])[0]


def _result(reference: Any, unit: Unit) -> float:
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


def release(run: Place) -> None:
    """Give back what a run's last training group may still hold. Ray does so itself, unless memory ran out and
    took the group's keepers with it; then other trials would wait for those CPUs for ever."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    with suppress(FileNotFoundError):
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(_group_file(run).read_text())))
        _group_file(run).unlink()


def _group_file(run: Place) -> Path:
    return run.path / ".placement-group"


# What runs on the workers


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


def _run_unit(unit: Unit, cpus: int) -> float:
    torch.set_num_threads(cpus)
    return unit.run(local_context(cpus))


def _train_worker(config: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import get_device
    from ray.util.placement_group import get_current_placement_group

    if config["failure"].exists():  # a peer gave up for good; this restart of the group ends at once
        return
    torch.set_num_threads(config["cpus"])
    # What train.deterministic needs, before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    place = train.get_context()
    rank, world_size = place.get_world_rank(), place.get_world_size()
    context = Peer(get_device(), config["cpus"], rank, world_size, config["image_memory"])
    group = get_current_placement_group()
    if rank == 0 and group is not None:
        write_text(_group_file(config["run"]), group.id.hex())
    try:
        config["body"](context, config["experiment"], config["run"])
    except PipelineError as error:
        write_text(config["failure"], str(error))
        raise
