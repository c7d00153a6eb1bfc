"""The Ray of one command, and the pool on a real cluster of four logical GPUs, as Ray gives them out."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import torch

from pipeline.compute import ray_train
from pipeline.compute.interrupt import StopRequest
from pipeline.compute.local_ray import require_ray
from pipeline.compute.resources import resolve_resources
from pipeline.compute.session import RaySession
from pipeline.compute.units import Unit, UnitKind
from pipeline.config import load_cluster, load_experiment
from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.stages import train
from pipeline.store.files import translate_write_errors, write_json
from pipeline.sweep.points import count_sharing_trials

pytestmark = pytest.mark.ray

COMMAND = """
import os, signal
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
from pipeline.compute.local_ray import ENVIRONMENT, end_local_ray, start_local_ray
os.environ.update(ENVIRONMENT)
processes = start_local_ray()
import ray
print(ray.get_runtime_context().gcs_address, flush=True)
input()
print(ray.get(ray.remote(lambda: "still here").remote()), flush=True)
end_local_ray(processes)
"""


def test_a_local_ray_wants_its_token_listens_on_the_loopback_outlives_signals_and_ends_whole(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as command:  # fmt: skip
        address = command.stdout.readline().strip()
        family = psutil.Process(command.pid).children(recursive=True)
        everybody = [psutil.Process(command.pid), *family]
        sockets = [s for one in everybody for s in one.net_connections("inet") if s.status == "LISTEN"]
        assert {s.laddr.ip.removeprefix("::ffff:") for s in sockets} == {"127.0.0.1"}
        token = family[0].environ()["RAY_AUTH_TOKEN"]
        assert len(token) == 64 and not any(token in " ".join(one.cmdline()) for one in everybody)
        refused = pytest.raises(grpc.RpcError, match="UNAUTHENTICATED")
        with grpc.insecure_channel(address) as stranger, refused:
            stranger.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=10)
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.killpg(command.pid, number)
        assert command.communicate("\n", timeout=60)[0] == "still here\n" and command.returncode == 0
        assert not psutil.wait_procs(family, timeout=0)[1]
    assert not (tmp_path / ".ray").exists(), "the token stands in a file"


def test_a_ray_that_was_killed_is_missed():
    with subprocess.Popen(["sleep", "60"]) as daemon:
        processes = {psutil.Process(daemon.pid)}
        require_ray(processes)
        daemon.kill()
        os.waitid(os.P_PID, daemon.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(PipelineError, match="the same command continues"):
            require_ray(processes)


LONG = 120
WORKERS = ["workers=2", "cpus_per_worker=1"]


@functools.cache
def read_first_devices() -> str:
    """What CUDA would go on using in this process, whatever Ray says later."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def meet(folder: Path, processes: int) -> None:
    (folder / f"process-{os.getpid()}").touch()
    deadline = time.monotonic() + LONG
    while len(list(folder.glob("process-*"))) < processes:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def write_note(worker, file: Path, processes: int = 1) -> None:
    devices = {"first": read_first_devices(), "now": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    meet(file.parent, processes)
    with file.open("x") as stream:
        json.dump({"pid": os.getpid(), "device": str(worker.device), **devices}, stream)


def wait_for_the_end(worker, file: Path) -> None:
    meet(file.parent, 1)
    time.sleep(LONG)
    file.touch()


def fail(worker, folder: Path, processes: int) -> None:
    meet(folder, processes)
    raise PipelineError("this unit cannot be done")


def die_at_first(worker, deaths: int, file: Path) -> None:
    tries = len(list(file.parent.glob(f"{file.name}-try-*")))
    (file.parent / f"{file.name}-try-{tries}").touch()
    if tries < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    write_note(worker, file)


def fail_at_first(worker, file: Path) -> None:
    """Fail once by the file system and once by the device, as the stages hand it on."""
    tries = len(list(file.parent.glob(f"{file.name}-try-*")))
    (file.parent / f"{file.name}-try-{tries}").touch()
    if tries == 0:
        with translate_write_errors(file):
            raise OSError(errno.ESTALE, "Stale file handle")
    if tries == 1:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    write_note(worker, file)


class Greedy(torch.nn.Module):
    """A network that no GPU can train."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_t, t, context=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def joined():
    """One session for all tests, whose actors live on from one to the next: each takes seconds to import torch."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:  # Ray's processes import this module
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 4})
        words = [*WORKERS, f"ray_address={cluster.address}"]
        with RaySession(load_cluster("local", words)) as session:
            yield session
        cluster.shutdown()


@pytest.fixture
def session(joined, monkeypatch):
    """The same session, with what a test changes put back after it."""
    for owner, name in ((joined, "is_interrupted"), (joined.pool, "limits"), (joined, "costs")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return joined


@contextmanager
def another_pool(session, *words, count_trials=lambda: 1):
    """A pool with other settings, which has the whole cluster."""
    session.pool.end_idle_actors()
    wait_for_free_gpus(4)
    cluster = load_cluster("local", [*WORKERS, *words])
    resources = resolve_resources(cluster, session.list_nodes())
    with RaySession.open_for_trial(cluster, resources, lambda: False, count_trials) as other:
        yield other
    wait_for_free_gpus(4)


def take(**resources):
    """Give these to somebody else, until remove_group."""
    import ray
    from ray.util import placement_group

    group = placement_group([resources])
    ray.get(group.ready(), timeout=LONG)
    return group


def units_of(folder: Path, count: int, needs_gpu: bool = True, body=write_note, **arguments) -> list[Unit]:
    kind = UnitKind.SAMPLES if needs_gpu else UnitKind.SHARD
    body = functools.partial(body, **arguments)
    names = [f"{kind}-{n}" for n in range(count)]
    return [Unit(kind, body, (folder / name,), name, needs_gpu=needs_gpu) for name in names]


def notes_of(units) -> list[dict]:
    return [json.loads(unit.args[0].read_text()) for unit in units]


def wait_for_free_gpus(count: int, seconds: float = LONG) -> None:
    import ray

    deadline = time.monotonic() + seconds
    while ray.available_resources().get("GPU", 0) < count:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


def test_a_machine_with_other_libraries_is_named_once(session, capsys):
    from conftest import wait_until  # Ray's processes import this module, and have no conftest

    session.known_libraries.clear()
    wait_until(lambda: session.must_stop() or not session.library_calls)
    session.must_stop()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "numbers may differ" in line]
    assert ") has torch " in line and ", the driver torch " in line


def test_each_actor_keeps_one_gpu_until_training_gets_it_and_then_the_pool_gets_it_back(
    session, tmp_path, monkeypatch
):
    finished, free = [], []
    note = lambda *_: free.append(wait_for_free_gpus(4, seconds=LONG / 2))  # noqa: E731
    monkeypatch.setattr(ray_train, "run_training_group", note)
    for name, count, processes in (("first", 24, 4), ("second", 8, 1), ("after", 2, 1)):
        (tmp_path / name).mkdir()
        session.run_units(units_of(tmp_path / name, count, processes=processes), finished.append)
        if name == "second":
            rows = notes_of(finished)
            assert {row["now"] for row in rows} == {"0", "1", "2", "3"}
            assert len({row["pid"] for row in rows}) == 4
            session.run_workers(None, tmp_path)
    assert len(finished) == len(set(map(id, finished))) == 34 and len(free) == 1
    assert all(row["now"] == row["first"] for row in notes_of(finished))
    assert [cost[:2] for cost in session.costs] == [("samples", 1)] * 34


def assert_cancelled(folder: Path) -> None:
    deadline = time.monotonic() + LONG / 2
    while alive := [file.name for file in folder.glob("process-*") if Path("/proc", file.name[8:]).exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert not list(folder.glob("s*"))


def test_an_error_ends_what_runs_and_frees_the_gpus(session, tmp_path):
    session.pool.limits = lambda: (2, 1)  # so that of each kind one unit waits
    networks = units_of(tmp_path, 2, body=wait_for_the_end)
    others = units_of(tmp_path, 2, needs_gpu=False, body=wait_for_the_end)
    failing = Unit(UnitKind.SAMPLES, fail, (tmp_path, 3), "failing", needs_gpu=True)
    with pytest.raises(PipelineError, match="this unit cannot be done"):
        session.run_units([failing, *networks, *others], lambda unit: None)
    assert_cancelled(tmp_path)
    wait_for_free_gpus(4)


@pytest.mark.parametrize("needs_gpu", [True, False])
def test_a_fault_of_storage_or_device_that_passes_ends_nothing(session, tmp_path, needs_gpu):
    unit = Unit(UnitKind.SAMPLES, fail_at_first, (tmp_path / "samples",), "unlucky", needs_gpu=needs_gpu)
    finished = []
    session.run_units([unit], finished.append)
    assert finished == [unit] and notes_of([unit]) and len(list(tmp_path.glob("*-try-*"))) == 3


def test_an_interruption_ends_what_runs(session, tmp_path):
    session.pool.limits = lambda: (1, 1)
    session.is_interrupted = lambda: len(list(tmp_path.glob("process-*"))) == 2
    units = [u for needs_gpu in (True, False) for u in units_of(tmp_path, 2, needs_gpu, wait_for_the_end)]
    session.run_units(units, lambda unit: None)
    assert_cancelled(tmp_path)


def test_the_unit_of_a_killed_actor_is_done_by_another_and_not_again_and_again(session, tmp_path, caplog):
    once, always = (
        Unit(UnitKind.SAMPLES, die_at_first, (deaths, tmp_path / name), name, needs_gpu=True)
        for name, deaths in (("once", 1), ("always", 9))
    )
    finished = []
    with another_pool(session, "retries=1") as pool:
        pool.run_units([once, *units_of(tmp_path, 1)], finished.append)
        assert sorted(unit.name for unit in finished) == ["once", "samples-0"]
        assert len(list(tmp_path.glob("once-try-*"))) == 2 and "'once' lost its process" in caplog.text
        with pytest.raises(PipelineError, match="'always' lost its process again and again"):
            pool.run_units([always], finished.append)
    assert len(list(tmp_path.glob("always-try-*"))) == 2 and len(finished) == 2


def test_the_units_of_a_studys_last_trial_take_what_the_others_held(session, tmp_path):
    def end_trials(*states: str) -> None:
        facts = {"reason": "", "label": "", "run": "", "rungs": []}
        trials = {str(i): {"state": state, **facts} for i, state in enumerate(states)}
        write_json(tmp_path / "state.json", {"trials": trials})

    end_trials("running", "running", "new", "failed")
    share = functools.partial(count_sharing_trials, tmp_path, 2)
    for name in ("first", "one", "last"):
        (tmp_path / name).mkdir()
    first, one = units_of(tmp_path / "first", 4), units_of(tmp_path / "one", 1)
    last = units_of(tmp_path / "last", 4, processes=2)
    with another_pool(session, "gpus_per_task=2", count_trials=share) as trial:
        trial.run_units(first, lambda unit: None)
        wait_for_free_gpus(2, seconds=5)  # each of two at once has half of them
        assert len({row["pid"] for row in notes_of(first)}) == 1
        trial.run_units([*one, *last], lambda unit: end_trials("finished", "running", "stopped", "failed"))
        assert len({row["pid"] for row in notes_of(last)}) == 2


def test_idle_actors_make_room_for_tasks(session, tmp_path):
    """An actor holds all CPUs; a unit without a network comes after it, and one beside it."""
    networks, others = units_of(tmp_path, 2), units_of(tmp_path, 2, needs_gpu=False)
    with another_pool(session, "cpus_per_task=8", "gpus_per_task=0") as pool:
        pool.run_units(networks[:1], lambda unit: None)
        pool.run_units([others[0], networks[1], others[1]], lambda unit: None)
    assert len(notes_of([*networks, *others])) == 4


def test_an_idle_actor_takes_a_unit_without_a_network(session, tmp_path):
    """A new process would import torch again."""
    (network,), (other,) = units_of(tmp_path, 1), units_of(tmp_path, 1, needs_gpu=False)
    with another_pool(session, "gpus_per_task=0") as pool:
        for unit in (network, other):
            pool.run_units([unit], lambda unit: None)
    assert len({row["pid"] for row in notes_of([network, other])}) == 1


def test_units_without_a_network_run_where_no_gpu_is_free(session, tmp_path):
    units = units_of(tmp_path, 2, needs_gpu=False)
    session.pool.end_idle_actors()
    group = take(GPU=4)
    session.run_units(units, lambda unit: None)
    ray_train.remove_group(group)
    assert {row["device"] for row in notes_of(units)} == {"cpu"}


def test_training_that_waits_for_a_place_says_so_and_is_stopped_in_seconds(
    session, tmp_path, capsys, monkeypatch
):
    from conftest import tiny_experiment

    monkeypatch.setattr("pipeline.compute.session.FREE_SECONDS", 1)
    session.pool.end_idle_actors()
    group = take(CPU=8)
    place, began = make_place(tiny_experiment(), tmp_path), time.monotonic()
    session.is_interrupted = lambda: time.monotonic() - began > 8
    with pytest.raises(StopRequest):
        session.run_workers(None, place)
    ray_train.remove_group(group)
    assert time.monotonic() - began < 8 + 5
    # It would outlive Ray, and crash.
    assert "ray-train" not in [thread.name for thread in threading.enumerate()]
    assert "waiting for 2 x (1 CPUs, 1 GPUs): 0 CPUs and 4 GPUs are free" in capsys.readouterr().out


def test_a_gpu_that_is_too_small_ends_the_group_at_once_with_a_line(session, sharded_storage, tmp_path):
    from conftest import TINY

    shutil.copytree(sharded_storage / "data", tmp_path / "data")
    words = [word for word in TINY if not word.startswith("model.")]
    experiment = load_experiment("digits", [*words, "model=null", "model.name=test_pool:Greedy"])
    place = make_place(experiment, tmp_path)
    place.path.mkdir()
    remedy = r"^a training step needs more memory.*train\.accumulate=2"
    with another_pool(session, "gpus_per_worker=0") as other, pytest.raises(PipelineError, match=remedy):
        other.run_workers(train.STAGE.run_worker, place)
    begun = "".join(log.read_text() for log in place.worker_logs.iterdir()).count(" begins on ")
    assert 1 <= begun <= 2, "one attempt of two workers"


def test_the_group_of_a_lost_controller_is_released_before_the_next(session, tmp_path, monkeypatch):
    import ray
    from conftest import tiny_experiment, wait_until

    group, place = take(CPU=8), make_place(tiny_experiment(), tmp_path)
    place.path.mkdir(parents=True, exist_ok=True)
    place.placement_group.write_text(group.id.hex())
    monkeypatch.setattr(ray_train, "run_in_thread", lambda *_: None)
    ray_train.run_training_group(session.cluster, session.resources, None, place, lambda: None)
    wait_until(lambda: ray.available_resources().get("CPU") == 8, 30)
