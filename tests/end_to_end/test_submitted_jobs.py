"""Jobs on a real Ray head with a token: followed, refused, stopped and submitted again."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from conftest import ROOT, TINY, free_port, read_losses, wait_until

from pipeline.engine.code import find_commit
from pipeline.store.run import list_steps

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKEN = secrets.token_hex(16)
WAIT = 300.0


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a Ray head of its own: ports, temporary folder, token, and no code of ours on its path."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets want a short path
    port = free_port()
    command = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats",
        f"--temp-dir={folder}", f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
        f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
        "--min-worker-port=0", "--max-worker-port=0", "--num-cpus=2", "--object-store-memory=100000000",
        "--memory=2000000000",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    for name in ("PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
    with (folder / "head.log").open("w") as log:
        how = {"stdout": log, "stderr": log, "start_new_session": True}
        head = subprocess.Popen(command, env=environment, cwd=folder, **how)
    try:
        wait_until(lambda: answers(port), running=head)
        yield f"http://127.0.0.1:{port}"
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(port: int) -> bool:
    with suppress(OSError):
        return urlopen(f"http://127.0.0.1:{port}/api/gcs_healthz", timeout=5).status == 200
    return False


class Client:
    """The program as a person runs it, in a folder with a conf/ of its own, beside the cluster."""

    def __init__(self, head: str, folder: Path):
        self.folder, self.storage = folder, folder / "storage"
        self.processes: list[subprocess.Popen] = []
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "RAY_API_SERVER_ADDRESS": head, "RAY_AUTH_TOKEN": TOKEN
        }  # fmt: skip
        (folder / "conf").mkdir()
        shutil.copy(ROOT / "conf" / "digits.yaml", folder / "conf" / "mine.yaml")
        self.where = [f"cluster.storage={self.storage}", "cluster.workers=1", "cluster.cpus_per_worker=1"]

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words], cwd=self.folder, env={**self.environment, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # where these tests run in the background of a shell, Ctrl-C would be ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.processes.append(process)
        return process

    def ddpm(self, *words: str, **environment: str) -> tuple[int, str]:
        """(exit code, output)"""
        process = self.start(*words, **environment)
        output, _ = process.communicate(timeout=2 * WAIT)
        assert TOKEN not in output
        return process.returncode, output

    def run_directory(self) -> Path:
        (found,) = (path.parent for path in self.storage.glob("tiny-*/experiment.yaml"))
        return found

    def steps(self) -> list[int]:
        runs = self.storage.glob("tiny-*")
        return sorted(step for run in runs for step in list_steps(run / "train"))


@pytest.fixture
def client(head, tmp_path) -> Iterator[Client]:
    client = Client(head, tmp_path)
    yield client
    for process in client.processes:
        process.kill()
        process.wait()


def test_a_followed_job_ends_with_its_files_and_its_exit_code(client):
    words = ["--", "run", "mine", *TINY, "figures.which=[samples]", *client.where]
    code, output = client.ddpm("submit", "--follow", "--id", "first", *words)
    assert code == 0, output
    run = client.run_directory()
    assert (run / "report" / "report.html").exists() and list(run.glob("evaluation/*/metrics.json"))
    assert yaml.safe_load((run / "experiment.yaml").read_text())["made_with"]["commit"] == find_commit()
    assert "train: 6/6 steps" in output and "job first: done" in output
    assert "\x1b" not in output and "\r" not in output  # plain lines, no bars

    code, output = client.ddpm("submit", "--id", "first", *words)
    assert code == 2 and "there is already a job 'first'" in output
    code, output = client.ddpm("jobs")
    assert code == 0 and "first" in output and "succeeded" in output and "ddpm run mine" in output
    code, output = client.ddpm("jobs", "logs", "frist")
    assert code == 1 and "did you mean 'first'?" in output


def test_a_job_that_fails_fails_its_follower(client):
    words = ["run", "cifar10", "data.path=/nowhere", *client.where]
    code, output = client.ddpm("submit", "--follow", "--", *words)
    assert code == 1
    assert "error:" in output and "/nowhere" in output and "failed with exit code 1" in output


def test_a_stopped_job_goes_on_when_it_is_submitted_again(client):
    """Stopped in training by `ddpm jobs stop`, while one person follows it and another stops following.

    The head has the memory of one driver: a second job waits, says so, and runs when the first has ended.
    """
    forever = ["train", "mine", *TINY, "train.steps=1000000", "train.checkpoint_every=10", *client.where]
    code, output = client.ddpm("submit", "--id", "again", "--", *forever)
    assert code == 0 and "ddpm jobs stop again" in output
    follower, other = (client.start("jobs", "logs", "again", "--follow") for _ in range(2))
    wait_until(client.steps)
    assert any("train:" in line for line in other.stdout)  # and no further: it follows by now
    other.send_signal(signal.SIGINT)
    assert "the job continues" in other.communicate(timeout=WAIT)[0] and other.returncode == 130
    assert "running" in client.ddpm("jobs", "status", "again")[1]

    second = client.start("submit", "--follow", "--id", "second", "--", "shard", "mine", *TINY, *client.where)
    assert any("second waits:" in line for line in second.stdout)
    assert "pending" in client.ddpm("jobs", "status", "second")[1]
    code, output = client.ddpm("jobs", "stop", "again")
    assert code == 0 and "stopped; the same submit continues" in output
    assert second.wait(WAIT) == 0
    output = follower.communicate(timeout=WAIT)[0]
    assert follower.returncode == 130 and "stopping at the next safe point" in output
    run = client.run_directory()
    assert not list(run.glob(".stop*")), "killed rather than asked"
    stopped = max(client.steps())
    assert read_losses(run)[-1][0] == stopped, "it did not write the step at which it stopped"
    code, output = client.ddpm("jobs", "stop", "again")
    assert code == 1 and "has ended already" in output

    code, output = client.ddpm("submit", "--follow", "--", *forever, f"train.steps={stopped + 5}")
    assert code == 0, output
    assert max(client.steps()) == stopped + 5 and client.run_directory() == run
    assert [step for step, _ in read_losses(run)] == list(range(1, stopped + 6))
