"""Training groups of one to four processes, over gloo as Ray sets them up: the same run, whatever their number and
whatever becomes of them. Ray itself is beside the point here, and would need a core for each."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import free_port, read_losses, renamed, tiny_experiment

from pipeline import tracking
from pipeline.cli.status import format_status
from pipeline.compute import ray_train
from pipeline.compute.ray_train import RayWorker
from pipeline.engine.find import make_place
from pipeline.engine.provenance import write_record
from pipeline.stages import report, train
from pipeline.store import checkpoint
from pipeline.store.files import hash_file, lock_folder
from pipeline.store.log import describe_slow_rank, find_last_line_end, read_points
from pipeline.store.run import list_steps
from pipeline.tracking.run_sender import RunSender

STEPS = 30
LONG = 120  # seconds in which any of these groups is through


class Member(RayWorker):
    """A training worker that has nobody to report to, and stops after so many steps."""

    steps_left = None
    slow_rank = None

    def wrap_network(self, net):
        wrapped = super().wrap_network(net)
        if self.rank == self.slow_rank:
            wrapped.register_forward_pre_hook(lambda *_: time.sleep(0.2))
        return wrapped

    def report_checkpoint(self, step):
        pass

    def will_lose_node(self):
        return False

    def broadcast_number(self, number):
        if self.steps_left is None:
            return super().broadcast_number(number)
        self.steps_left -= 1
        return self.steps_left == 0


def member(rank, world_size, port, experiment, run, steps, slow_rank):
    torch.set_num_threads(1)
    place = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=world_size)
    context = Member(torch.device("cpu"), 1, rank, world_size)
    context.steps_left, context.slow_rank = steps, slow_rank
    train.STAGE.run_worker(context, run.replace_experiment(experiment))
    torch.distributed.destroy_process_group()


class Group:
    def __init__(self, workers, experiment, run, steps=None, slow_rank=None):
        self.run = run
        port = free_port()
        server = multiprocessing.get_context("forkserver")
        heavy = "torch._inductor.config", "torch.nn.parallel.distributed"  # which each member would import
        server.set_forkserver_preload([*heavy, "pipeline.stages.train", RayWorker.__module__, __name__])
        args = (workers, port, experiment, run, steps, slow_rank)
        self.processes = [server.Process(target=member, args=(rank, *args)) for rank in range(workers)]
        for process in self.processes:
            process.start()

    def wait_for_step(self, step):
        deadline = time.monotonic() + LONG
        while not any(found >= step for found in list_steps(self.run.train)):
            assert time.monotonic() < deadline and all(p.is_alive() for p in self.processes)
            time.sleep(0.01)

    def kill(self, rank):
        """One is killed; the rest of the group is of no use, and Ray ends it too."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)
        time.sleep(0.2)
        for process in self.processes:
            process.kill()
        self.finish()

    def finish(self):
        for process in self.processes:
            process.join(LONG)
        return [process.exitcode for process in self.processes]


def experiment_of(run, dropout=0.0):
    """17 images a batch: one to four slices of it are never all equal."""
    return tiny_experiment(
        f"name={run.experiment.name}", f"model.dropout={dropout}", f"train.steps={STEPS}", "train.batch_size=17",
        "train.checkpoint_every=5", "train.log_every=2", "train.keep=20",
    )  # fmt: skip


def apart(run, name):
    return renamed(run, f"-{name}")


def losses(run):
    return read_losses(run.path)


def state_hash(run, step):
    return hash_file(run.locate_step(step) / checkpoint.STATE)


@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_a_group_that_was_killed_and_stopped_ends_as_an_untouched_one(tiny_run, workers):
    run = tiny_run
    experiment = experiment_of(run, dropout=0.2)
    untouched = apart(run, "untouched")
    assert set(Group(workers, experiment, untouched).finish()) == {0}

    first = Group(workers, experiment, run)
    first.wait_for_step(5)
    first.kill(random.Random(workers).randrange(workers))
    assert not run.locate_step(STEPS).exists(), "killed too late to prove anything"
    second = Group(workers, experiment, run)
    second.wait_for_step(checkpoint.find_newest_step(run, STEPS) + 5)
    run.stop_file.touch()
    assert set(second.finish()) == {0}
    run.stop_file.unlink()
    assert not run.locate_step(STEPS).exists(), "stopped too late to prove anything"
    assert set(Group(workers, experiment, run).finish()) == {0}

    assert state_hash(run, STEPS) == state_hash(untouched, STEPS)
    assert losses(run) == losses(untouched)


def test_a_slow_rank_is_seen_in_log_mlflow_status_and_page(tiny_run, empty_store, tmp_path, undrawn):
    """Though each waits for the slower one, and steps take equally long on both."""
    run = tiny_run
    assert set(Group(2, experiment_of(run), run, 8, slow_rank=1).finish()) == {0}
    points = read_points(run.log)
    sentence = describe_slow_rank(points)
    assert sentence.startswith("rank 1 takes ") and "logs/rank-1.log" in sentence
    write_record(run, [])
    with lock_folder(run.path):
        assert "rank 1 takes" in " ".join(format_status(run.storage).split())
    assert not list(report.STAGE.work(run)) and "rank 1 takes" in run.report_html.read_text()
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    sender = RunSender(tracking.find_default_uri(tmp_path), "slow", run)
    sender.send_log(0, find_last_line_end(run.log))
    found = sender.client.get_run(sender.run_id).data.metrics
    assert found["train/step_seconds_max"] > max(0.2, found["train/step_seconds_min"])
    assert found["train/slowest_rank"] == 1
    for number, point in enumerate(points[:4]):
        point["metrics"]["train/slowest_rank"] = number % 2
    assert not describe_slow_rank(points[:4]), "both are the slowest as often"


@pytest.mark.parametrize(("lost", "after", "told"), [
    ("b", "a", "host-b (10.0.0.2) was lost: 20 steps from step 30 are repeated, by 1 of 3 workers"),
    ("", "ab", "a worker was lost: 20 steps from step 30 are repeated, by 2 of 3 workers"),
    ("", "abc", "more machines have joined: 20 steps from step 30 are repeated, by 3 of 3 workers"),
])  # fmt: skip
def test_a_lost_machine_and_the_steps_it_costs_are_named(tmp_path, monkeypatch, capsys, lost, after, told):
    """With what Ray says of its machines and groups; tests/cluster loses real ones."""
    nodes = [{"NodeID": name, "Alive": name != lost, "NodeManagerHostname": f"host-{name}"} for name in "ab"]
    nodes = [{**node, "NodeManagerAddress": "10.0.0.2"} for node in nodes]
    monkeypatch.setattr(ray_train.ray, "nodes", lambda: nodes)
    place = make_place(tiny_experiment(), tmp_path)
    watch = ray_train.LossWatch(place, workers=3)
    watch.poll()
    place.locate_step(30).mkdir(parents=True)
    for group in ("ab", after):
        monkeypatch.setattr(ray_train, "read_group", lambda _: {"bundles_to_node_id": dict(enumerate(group))})  # noqa: B023
        place.placement_group.write_text(ray_train.PlacementGroupID.from_random().hex())
        watch.poll()
        place.heartbeat.write_text("50")
        watch.poll()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(told)


@pytest.mark.slow
def test_one_to_four_workers_train_alike_and_their_number_may_change(tiny_run):
    """Also from one resumption to the next: 3, then 1, then 4, changed between two points of the curve."""
    run = tiny_run
    for workers in (1, 2, 3, 4):
        assert set(Group(workers, experiment_of(run), apart(run, str(workers))).finish()) == {0}
    changing = apart(run, "changing")
    for workers, steps in ((3, 11), (1, 10), (4, None)):
        assert set(Group(workers, experiment_of(run), changing, steps).finish()) == {0}
    assert {11, 21} <= set(list_steps(changing.train))
    alone = losses(apart(run, "1"))
    assert [step for step, _ in alone] == sorted({*range(2, 31, 2), *range(5, 31, 5)})
    for name in ("2", "3", "4", "changing"):
        assert losses(apart(run, name)) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in alone]
