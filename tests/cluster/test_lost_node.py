"""A head and two nodes with a training worker each, on hosts of their own; one of the nodes is lost in mid-training."""

import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hosts
import pytest
from compose_file import COMPOSE, VARIABLE, services
from conftest import ONE_CPU, TINY, read_losses, wait_until

from pipeline.store.files import hash_file

pytestmark = [pytest.mark.ray, *hosts.MARKS]

STEPS = 600
EXPERIMENT = [
    *TINY, f"train.steps={STEPS}", "train.batch_size=17", "train.checkpoint_every=25", "train.log_every=10",
    "train.keep=2",
]  # fmt: skip
SERVICES = {"ray-head": "ray-head", "node-1": "ray-worker", "node-2": "ray-worker"}


class Nodes:
    """The hosts with their services, and training on them."""

    def __init__(self, folder: Path):
        env = {name: secrets.token_hex(32) for name, _ in VARIABLE.findall(COMPOSE.read_text())}
        self.volumes, self.of_file = folder / "volumes", services(env | {"WORKER_CPUS": "1"})
        self.network = hosts.Network(folder / "hosts", SERVICES)

    def start(self, host: str, volumes: str = "") -> None:
        service = self.of_file[SERVICES[host]]
        # A worker has the memory of one job's driver; the file's limit is the engine's.
        memory = ["--memory=2000000000"] if host != "ray-head" else []
        command = {"command": [*service["command"], *memory]}
        self.network[host].start(service | command, self.volumes / volumes)
        self.network[host].wait_until_healthy(service["healthcheck"])

    def ddpm(self, *words: str) -> str:
        told = self.network["ray-head"].execute(sys.executable, "-m", "pipeline", *words, timeout=900)
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout

    def find_run(self, folder: str) -> Path:
        (run,) = (self.volumes / "runs" / folder).glob("tiny-*")
        return run

    def train(self, folder: str, *words: str) -> Path:
        where = ["cluster.ray_address=auto", f"cluster.storage=/srv/runs/{folder}", "cluster.workers=2"]
        told = self.ddpm("train", "digits", *EXPERIMENT, *where, *words)
        self.losses = re.findall(r"\((\S+)\) was lost: (\d+) steps from step (\d+) ", told)
        return self.find_run(folder)

    def read_step(self, folder: str) -> int:
        steps = (self.volumes / "runs").glob(f"{folder}/tiny-*/.step")
        return max((int(file.read_text() or 0) for file in steps), default=0)


@pytest.fixture
def nodes(tmp_path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    try:
        for host in SERVICES:
            nodes.start(host)
        yield nodes
    finally:
        nodes.network.close()


def test_a_job_waits_until_a_node_has_its_memory_free(nodes):
    def trains(name: str) -> bool:
        return bool(list(nodes.volumes.glob(f"runs/{name}-*/.step")))

    for name in ("one", "two", "three"):
        words = [*EXPERIMENT, f"name={name}", "train.steps=1000000", *ONE_CPU, "cluster.storage=/srv/runs"]
        nodes.ddpm("submit", "--id", name, "--", "train", "digits", *words)
    wait_until(lambda: trains("one") and trains("two"), 300)
    told = nodes.ddpm("jobs", "status", "three")
    assert "pending" in told and not trains("three"), told
    nodes.ddpm("jobs", "stop", "one")
    wait_until(lambda: trains("three"), 300)
    for name in ("two", "three"):
        nodes.ddpm("jobs", "stop", name)


def test_doctor_names_the_node_that_sees_another_folder(nodes):
    head, other = nodes.network["ray-head"], nodes.network["node-2"]
    words = ["doctor", "cluster.ray_address=auto", "cluster.storage=/srv/runs"]
    told = head.execute(sys.executable, "-m", "pipeline", *words).stdout
    assert "machines           3 see this folder and its locks\n" in told, told
    other.stop(nodes.of_file["ray-worker"])
    nodes.start("node-2", volumes="another")
    told = head.execute(sys.executable, "-m", "pipeline", *words).stdout
    (line,) = [line for line in told.splitlines() if line.startswith("machines")]
    assert line.count("sees another folder") == 1 and f"({other.address}) sees another folder" in line


def test_a_node_that_is_taken_away_costs_seconds(nodes):
    """SIGTERM, as an eviction sends it: the workers save at the notice, and one goes on from there."""
    command = ["train.steps=4000", "train.checkpoint_every=100000", "cluster.min_workers=1"]
    with ThreadPoolExecutor() as threads:
        ended = threads.submit(nodes.train, "taken", *command)
        wait_until(lambda: nodes.read_step("taken") > 50, 300)
        reached, run = nodes.read_step("taken"), nodes.find_run("taken")
        assert not list(run.glob("train/step_*"))
        taken = threads.submit(nodes.network["node-2"].stop, nodes.of_file["ray-worker"])
        wait_until(lambda: list(run.glob("train/step_*")), 25)
        saved = int(next(run.glob("train/step_*")).name[5:])
        taken.result()
        log = run / "logs" / "rank-0.log"
        wait_until(lambda: "rank 0 of 1 begins" in log.read_text(), 200)
        again = time.time()
        wait_until(lambda: (run / ".step").stat().st_mtime > again, 60)
        assert reached <= saved <= nodes.read_step("taken"), "the smaller group goes on from there"
        assert f"a checkpoint of step {saved}, then continuing" in log.read_text()
        assert ended.result() == run
    ((lost, _, start),) = nodes.losses
    assert (lost, int(start)) == (nodes.network["node-2"].address, saved)
    assert len(read_losses(run)) == 400


def test_training_waits_for_a_node_that_returns_and_ends_with_the_same_bits(nodes):
    """Cut off first: nothing tells its peer that it is gone."""
    untouched, node = nodes.train("untouched"), nodes.network["node-2"]
    with ThreadPoolExecutor() as threads:
        command = threads.submit(nodes.train, "returns")
        wait_until(lambda: nodes.read_step("returns") > 50, 300)
        subprocess.run(["ip", "-netns", node.namespace, "link", "set", "eth0", "down"], check=True)
        time.sleep(10)
        node.kill()
        reached = nodes.read_step("returns")
        assert reached < STEPS, "it was over before anything broke"
        time.sleep(10)
        assert not command.done() and nodes.read_step("returns") == reached
        subprocess.run(["ip", "-netns", node.namespace, "link", "set", "eth0", "up"], check=True)
        nodes.start("node-2")
        run = command.result()
    ((lost, steps, start),) = nodes.losses
    assert (lost, int(start) + int(steps)) == (node.address, reached) and int(start) % 25 == 0
    state = f"train/step_{STEPS:08d}/state.safetensors"
    assert hash_file(run / state) == hash_file(untouched / state)
    assert read_losses(run) == read_losses(untouched)
