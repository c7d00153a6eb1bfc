"""The pool on a real Ray cluster of four logical GPUs: Ray sets CUDA_VISIBLE_DEVICES as it does for real ones."""

import functools
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.compute import ray_train
from pipeline.compute.session import RaySession
from pipeline.compute.units import Unit, UnitKind
from pipeline.config import load_cluster
from pipeline.errors import PipelineError

pytestmark = pytest.mark.ray
LONG = 120


@functools.cache
def first_devices() -> str:
    """What CUDA would go on using in this process, whatever Ray says later."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def meet(folder: Path, peers: int) -> None:
    """Wait until so many processes have a unit of this folder."""
    (folder / f"process-{os.getpid()}").touch()
    deadline = time.monotonic() + LONG
    while len(list(folder.glob("process-*"))) < peers:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def note(ctx, file: Path, seconds: float = 0.1, peers: int = 1) -> None:
    """Write where this ran; fails where it was done before."""
    here = {"pid": os.getpid(), "first": first_devices(), "now": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    meet(file.parent, peers)
    time.sleep(seconds)
    with file.open("x") as stream:
        json.dump({**here, "device": str(ctx.device)}, stream)


def fail(ctx, folder: Path, peers: int) -> None:
    meet(folder, peers)
    raise PipelineError("this unit cannot be done")


def die_at_first(ctx, deaths: int, file: Path) -> None:
    """Take its process with it so many times."""
    tries = len(list(file.parent.glob(f"{file.name}-try-*")))
    (file.parent / f"{file.name}-try-{tries}").touch()
    if tries < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    note(ctx, file)


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:  # Ray's processes import this module
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 4})
        yield cluster.address
        cluster.shutdown()


@pytest.fixture
def session(address, request):
    words = getattr(request, "param", ["workers=2"])
    with RaySession(
        load_cluster("local", [f"ray_address={address}", "cpus_per_worker=1", *words])
    ) as session:
        yield session


def units_of(
    folder: Path, count: int, needs_gpu: bool = True, seconds: float = 0.1, peers: int = 1
) -> list[Unit]:
    kind = UnitKind.SAMPLES if needs_gpu else UnitKind.SHARD
    return [
        Unit(kind, note, (folder / f"{kind}-{n}", seconds, peers), f"{kind} {n}", needs_gpu=needs_gpu)
        for n in range(count)
    ]


def notes_of(units) -> list[dict]:
    return [json.loads(unit.args[0].read_text()) for unit in units]


def wait_for_free_gpus(count: int) -> None:
    import ray

    deadline = time.monotonic() + LONG
    while ray.available_resources().get("GPU", 0) < count:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


def test_each_actor_keeps_one_gpu_and_a_second_map_uses_the_same_actors(session, tmp_path):
    (tmp_path / "more").mkdir()
    first, second = units_of(tmp_path, 24, peers=4), units_of(tmp_path / "more", 8)
    finished = []
    session.map_units(first, finished.append)
    session.map_units(second, finished.append)
    assert len(finished) == len(set(finished)) == 32
    rows = notes_of(finished)
    assert all(row["now"] == row["first"] for row in rows)
    assert {row["now"] for row in rows} == {"0", "1", "2", "3"}
    assert len({row["pid"] for row in rows}) == 4
    assert session.costs.by_kind["samples"]["images"] == 32
    session.pool.end()
    wait_for_free_gpus(4)


def test_units_without_a_network_run_where_no_gpu_is_free(session, tmp_path):
    import ray

    holders = [ray.remote(num_gpus=1, num_cpus=0)(Holder).remote() for _ in range(4)]
    ray.get([holder.hold.remote() for holder in holders])
    units = units_of(tmp_path, 6, needs_gpu=False)
    session.map_units(units, lambda unit: None)
    assert {row["device"] for row in notes_of(units)} == {"cpu"}


class Holder:
    def hold(self) -> None:
        pass


@pytest.mark.parametrize("session", [["workers=2", "cpus_per_task=4", "gpus_per_task=0"]], indirect=True)
def test_idle_actors_make_room_for_tasks(session, tmp_path):
    """Two actors hold all CPUs; a unit without a network comes after them, and one beside them."""
    networks, others = units_of(tmp_path, 4), units_of(tmp_path, 2, needs_gpu=False)
    session.map_units(networks[:2], lambda unit: None)
    session.map_units([others[0], *networks[2:], others[1]], lambda unit: None)
    assert len(notes_of([*networks, *others])) == 6


def test_the_unit_of_a_killed_actor_is_done_by_another(session, tmp_path, caplog):
    mortal = Unit(UnitKind.SAMPLES, die_at_first, (2, tmp_path / "mortal"), "mortal", needs_gpu=True)
    units = [mortal, *units_of(tmp_path, 8)]
    finished = []
    session.map_units(units, finished.append)
    assert sorted(unit.name for unit in finished) == sorted(unit.name for unit in units)
    assert len(list(tmp_path.glob("mortal-try-*"))) == 3
    assert "'mortal' lost its process" in caplog.text


@pytest.mark.parametrize("session", [["workers=2", "retries=1"]], indirect=True)
def test_a_unit_that_always_loses_its_process_ends_the_map(session, tmp_path):
    mortal = Unit(UnitKind.SAMPLES, die_at_first, (9, tmp_path / "mortal"), "mortal", needs_gpu=True)
    with pytest.raises(PipelineError, match="'mortal' lost its process again and again"):
        session.map_units([mortal], lambda unit: None)
    assert len(list(tmp_path.glob("mortal-try-*"))) == 2


def test_an_error_ends_what_is_under_way_and_frees_the_gpus(session, tmp_path):
    networks = units_of(tmp_path, 6, seconds=6)
    others = units_of(tmp_path, 2, needs_gpu=False, seconds=6)
    failing = Unit(UnitKind.SAMPLES, fail, (tmp_path, 6), "failing", needs_gpu=True)
    with pytest.raises(PipelineError, match="this unit cannot be done"):
        session.map_units([failing, *networks, *others], lambda unit: None)
    session.pool.end()
    wait_for_free_gpus(4)
    time.sleep(7)
    assert not list(tmp_path.glob("s*")), "the others were cancelled"


def test_an_interruption_ends_what_is_under_way(session, tmp_path):
    session.pool.interrupted = lambda: len(list(tmp_path.glob("process-*"))) == 4
    session.map_units(units_of(tmp_path, 6, seconds=6), lambda unit: None)
    time.sleep(7)
    assert not list(tmp_path.glob("samples-*"))


def test_training_gets_the_gpus_and_the_pool_keeps_off_them(session, tmp_path, monkeypatch):
    """The pool has all four; then a group trains on two, with units beside it on the other two; then all again."""
    for name in ("before", "during", "after"):
        (tmp_path / name).mkdir()
    before = units_of(tmp_path / "before", 8, peers=4)
    during, after = units_of(tmp_path / "during", 8), units_of(tmp_path / "after", 8)
    session.map_units(before, lambda unit: None)
    monkeypatch.setattr(ray_train, "run_training_group", train_on_two_gpus)

    def score() -> None:
        while not (tmp_path / "rank-0").exists() or not (tmp_path / "rank-1").exists():
            time.sleep(0.1)
        for start in range(0, 8, 2):
            session.map_units(during[start : start + 2], lambda unit: None)
        (tmp_path / "stop").touch()

    with ThreadPoolExecutor(1) as thread:
        beside = thread.submit(score)
        session.run_workers(None, tmp_path)
        beside.result()
    session.map_units(after, lambda unit: None)

    group = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1)]
    earlier = {row["pid"] for row in notes_of(before)}
    assert all(not (earlier & set(rank["alive"])) for rank in group), "no process of the pool was left"
    held = {device for rank in group for device in rank["devices"]}
    assert len(held) == 2 and not held & {row["now"] for row in notes_of(during)}
    assert all(row["now"] == row["first"] for row in [*notes_of(before), *notes_of(during), *notes_of(after)])
    assert len({row["pid"] for row in notes_of(during)}) <= 2


def train_on_two_gpus(cluster, resources, body, folder) -> None:
    """Ray Train with the resources of the session, without torch's process group: NCCL needs real GPUs."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    workers = {"CPU": 1, "GPU": resources.gpus_per_worker}
    DataParallelTrainer(
        hold_gpus,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=True, resources_per_worker=workers
        ),
        run_config=RunConfig(storage_path=str(folder / "ray")),
    ).fit()


def hold_gpus(config) -> None:
    from ray import train

    folder = config["folder"]
    alive = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    devices = (
        ",".join(map(str, train.get_context().get_world_rank() * [])) or os.environ["CUDA_VISIBLE_DEVICES"]
    )
    file = folder / f"rank-{train.get_context().get_world_rank()}"
    file.write_text(json.dumps({"alive": alive, "devices": devices}))
    while not (folder / "stop").exists():
        time.sleep(0.1)
