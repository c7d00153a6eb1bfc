"""A head and two nodes with a training worker each, on hosts of their own; one of the nodes is lost in mid-training."""

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import hosts
import pytest
from compose_file import COMPOSE, VARIABLE, services
from conftest import TINY
from hosts import read_losses, wait_until

from pipeline.store.files import hash_file

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(hosts.what_is_missing() is not None, reason=str(hosts.what_is_missing())),
]

STEPS = 600
EXPERIMENT = [
    *TINY, f"train.steps={STEPS}", "train.batch_size=17", "train.checkpoint_every=25", "train.log_every=10",
    "train.keep=2",
]  # fmt: skip
SERVICES = {"ray-head": "ray-head", "node-1": "ray-worker", "node-2": "ray-worker"}


class Cluster:
    """The head and the nodes as docker-compose.yml has them, and the commands that run on the head."""

    def __init__(self, folder: Path):
        env = {name: secrets.token_hex(32) for name, _ in VARIABLE.findall(COMPOSE.read_text())}
        of_file = services(env | {"WORKER_CPUS": "1"})
        self.services = {host: of_file[name] for host, name in SERVICES.items()}
        self.network = hosts.Network(folder / "hosts", SERVICES)
        self.volumes = folder / "volumes"
        self.commands = ThreadPoolExecutor()

    def up(self, *names: str) -> None:
        for name in names:
            self.network[name].start(self.services[name], self.volumes)
            self.network[name].wait_until_healthy(self.services[name]["healthcheck"])

    def train(self, folder: str, *words: str) -> Future[subprocess.CompletedProcess[str]]:
        where = ["cluster.ray_address=auto", f"cluster.storage=/srv/runs/{folder}", "cluster.workers=2"]
        command = [sys.executable, "-m", "pipeline", "train", "digits", *EXPERIMENT, *where, *words]
        return self.commands.submit(self.network["ray-head"].execute, *command, timeout=900)

    def run(self, folder: str) -> Path | None:
        return next((self.volumes / "runs" / folder).glob("tiny-*"), None)

    def step(self, folder: str) -> int:
        """The step that is under way."""
        file = (self.run(folder) or Path("nowhere")) / ".step"
        return int(file.read_text() or 0) if file.exists() else 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.up(*SERVICES)
        yield cluster
    finally:
        cluster.network.close()
        cluster.commands.shutdown()


@pytest.fixture(scope="module")
def untouched(cluster) -> Path:
    """The run that nothing happens to."""
    return finished(cluster, "untouched", cluster.train("untouched"))


def finished(cluster: Cluster, folder: str, command: Future[subprocess.CompletedProcess[str]]) -> Path:
    outcome = command.result()
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    run = cluster.run(folder)
    assert run is not None
    return run


def test_training_waits_for_a_node_that_returns_and_ends_with_the_same_bits(cluster, untouched):
    """Cut off first: nothing tells its peer that it is gone."""
    command = cluster.train("returns")
    wait_until(lambda: cluster.step("returns") > 50, 300)
    node = cluster.network["node-2"]
    subprocess.run(["ip", "-netns", node.namespace, "link", "set", "eth0", "down"], check=True)
    time.sleep(10)
    node.kill()
    reached = cluster.step("returns")
    assert reached < STEPS, "it was over before anything broke"
    time.sleep(10)
    assert not command.done() and cluster.step("returns") == reached
    subprocess.run(["ip", "-netns", node.namespace, "link", "set", "eth0", "up"], check=True)
    cluster.up("node-2")
    run = finished(cluster, "returns", command)
    state = f"train/step_{STEPS:08d}/state.safetensors"
    assert hash_file(run / state) == hash_file(untouched / state)
    assert read_losses(run) == read_losses(untouched)


def test_training_ends_on_what_is_left_where_it_may(cluster, untouched):
    command = cluster.train("left", "cluster.min_workers=1")
    wait_until(lambda: cluster.step("left") > 50, 300)
    cluster.network["node-2"].kill()
    assert cluster.step("left") < STEPS, "it was over before anything broke"
    run = finished(cluster, "left", command)
    assert [step for step, _ in read_losses(run)] == [step for step, _ in read_losses(untouched)]
    assert read_losses(run) == [
        (step, pytest.approx(loss, rel=0.02)) for step, loss in read_losses(untouched)
    ]
