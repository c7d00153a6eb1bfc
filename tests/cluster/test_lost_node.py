"""A head and two nodes with a training worker each, on hosts of their own; one of the nodes is lost in mid-training."""

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
from conftest import TINY, read_losses, wait_until

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


@pytest.fixture
def network(tmp_path) -> Iterator[hosts.Network]:
    network = hosts.Network(tmp_path / "hosts", SERVICES)
    try:
        yield network
    finally:
        network.close()


def test_training_waits_for_a_node_that_returns_and_ends_with_the_same_bits(network, tmp_path):
    """Cut off first: nothing tells its peer that it is gone."""
    env = {name: secrets.token_hex(32) for name, _ in VARIABLE.findall(COMPOSE.read_text())}
    of_file = services(env | {"WORKER_CPUS": "1"})
    runs = tmp_path / "volumes" / "runs"

    def start(host: str) -> None:
        service = of_file[SERVICES[host]]
        network[host].start(service, tmp_path / "volumes")
        network[host].wait_until_healthy(service["healthcheck"])

    def train(folder: str) -> Path:
        where = ["cluster.ray_address=auto", f"cluster.storage=/srv/runs/{folder}", "cluster.workers=2"]
        command = [sys.executable, "-m", "pipeline", "train", "digits", *EXPERIMENT, *where]
        outcome = network["ray-head"].execute(*command, timeout=900)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        (run,) = (runs / folder).glob("tiny-*")
        return run

    def read_step() -> int:
        return max((int(file.read_text() or 0) for file in runs.glob("returns/tiny-*/.step")), default=0)

    for host in SERVICES:
        start(host)
    untouched, node = train("untouched"), network["node-2"]
    with ThreadPoolExecutor() as threads:
        command = threads.submit(train, "returns")
        wait_until(lambda: read_step() > 50, 300)
        subprocess.run(["ip", "-netns", node.namespace, "link", "set", "eth0", "down"], check=True)
        time.sleep(10)
        node.kill()
        reached = read_step()
        assert reached < STEPS, "it was over before anything broke"
        time.sleep(10)
        assert not command.done() and read_step() == reached
        subprocess.run(["ip", "-netns", node.namespace, "link", "set", "eth0", "up"], check=True)
        start("node-2")
        run = command.result()
    state = f"train/step_{STEPS:08d}/state.safetensors"
    assert hash_file(run / state) == hash_file(untouched / state)
    assert read_losses(run) == read_losses(untouched)
