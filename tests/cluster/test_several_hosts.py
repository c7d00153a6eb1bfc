"""The topology of docker-compose.yml on hosts of their own: database, tracking server, head, two workers, client.

Each service is started with the very command and environment of the file, the values drawn by `make env`; the health
checks are the file's. A job is submitted from the client, and what it made is read through the tracking server.
"""

import json
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
from compose_file import ROOT, read_env, services
from conftest import ONE_CPU, TINY, read_losses, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(hosts.what_is_missing() is not None, reason=str(hosts.what_is_missing())),
]

# Host -> the name that the others call it by. Replicas share theirs.
NAMES = {
    "postgres": "postgres", "mlflow": "mlflow", "ray-head": "ray-head",
    "worker-1": "ray-worker", "worker-2": "ray-worker", "client": "client", "backup": "backup", "restore": "restore",
}  # fmt: skip
WAIT = {"entrypoint": ["sleep"], "command": ["infinity"]}  # a client that commands are run in
EXPERIMENT = [*TINY, "train.steps=40", "train.checkpoint_every=20", "figures.which=[samples]"]
LONG = [
    *TINY, "name=interrupted", "train.steps=1200", "train.checkpoint_every=50", "train.log_every=10", "train.keep=2",
]  # fmt: skip
GROUP = ["cluster.workers=2", "cluster.min_workers=1"]


class Cluster:
    def __init__(self, folder: Path):
        folder.joinpath(".env.example").write_text((ROOT / ".env.example").read_text())
        subprocess.run([sys.executable, ROOT / "deploy" / "make_env.py"], cwd=folder, check=True)
        self.env = read_env(folder / ".env") | {"WORKER_CPUS": "1"}
        self.volumes = folder / "volumes"
        self.network = hosts.Network(folder / "hosts", NAMES)
        of_file = services(self.env)
        self.services = {host: of_file.get(host) or of_file[name] for host, name in NAMES.items()}
        self.services["client"] |= WAIT

    def up(self, *names: str) -> None:
        for name in names:
            began = time.monotonic()
            self.network[name].start(self.services[name], self.volumes)
            if "healthcheck" in self.services[name]:
                self.network[name].wait_until_healthy(self.services[name]["healthcheck"])
            print(f"{name}: healthy after {time.monotonic() - began:.0f} s", flush=True)

    def run(self, name: str) -> None:
        self.network[name].start(self.services[name], self.volumes)
        process = self.network[name].process
        assert process and process.wait(120) == 0, self.network[name].tail()

    def client(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.network["client"].execute(*command, **environment)

    def submit(self, *words: str) -> str:
        name = f"test-{secrets.token_hex(4)}"
        told = self.client("ddpm", "submit", "--id", name, "--", *words)
        assert told.returncode == 0, told.stdout + told.stderr
        return name

    def wait_for_job(self, name: str) -> str:
        told = self.client("ddpm", "jobs", "logs", name, "--follow", timeout=1800)
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout

    def on_tracking_server(self, name: str) -> dict[str, Any]:
        """Run, metrics with their histories, and artifacts of a study's one run, read from the client."""
        told = self.client(sys.executable, "-c", READ_BACK, name, MLFLOW_TRACKING_URI="http://mlflow:5000")
        assert told.returncode == 0, told.stderr
        return json.loads(told.stdout.splitlines()[-1])

    def run_directory(self, name: str) -> Path:
        (path,) = (self.volumes / "runs").glob(f"{name}-*")
        return path


READ_BACK = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient()
study = client.get_experiment_by_name(sys.argv[1])
(run,) = client.search_runs([study.experiment_id])
points = {key: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
files = [file.path for folder in ("", "report") for file in client.list_artifacts(run.info.run_id, folder)]
local = client.download_artifacts(run.info.run_id, "experiment.yaml")
print(json.dumps({"status": run.info.status, "points": points, "files": files, "params": run.data.params,
                  "tags": run.data.tags, "experiment": open(local).read()}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.up(*(name for name in NAMES if name not in ("backup", "restore")))
        yield cluster
    finally:
        cluster.network.close()


@pytest.fixture(scope="module")
def first_run(cluster) -> str:
    return cluster.wait_for_job(cluster.submit("run", "digits", "--cluster", "compose", *EXPERIMENT, *GROUP))


def test_a_job_from_the_client_is_read_back_through_the_tracking_server(cluster, first_run):
    run, there = cluster.run_directory("tiny"), cluster.on_tracking_server("tiny")
    assert there["status"] == "FINISHED"
    assert [tuple(point) for point in there["points"]["loss/train"]] == read_losses(run)
    assert len(read_losses(run)) == 40
    (metrics,) = run.glob("evaluation/*/metrics.json")
    ((_, value),) = there["points"]["nll_bpd"]
    assert value == json.loads(metrics.read_text())["scores"]["nll_bpd"]
    assert there["experiment"] == (run / "experiment.yaml").read_text()
    assert "report/report.html" in there["files"]
    assert "http://mlflow:5000/#/experiments/" in first_run


def train_here(experiment: list[str], storage: Path) -> Path:
    words = ["train", "digits", *experiment, f"cluster.storage={storage}", *ONE_CPU]
    subprocess.run([sys.executable, "-m", "pipeline", *words], check=True, capture_output=True)
    (file,) = storage.glob("*/experiment.yaml")
    return file.parent


def test_two_hosts_train_as_one_process_does(cluster, first_run, tmp_path):
    alone, together = train_here(EXPERIMENT, tmp_path), cluster.run_directory("tiny")
    assert alone.name == together.name
    expected = [(step, pytest.approx(loss, rel=1e-4)) for step, loss in read_losses(alone)]
    assert read_losses(together) == expected


@pytest.mark.parametrize("token", ["", "0" * 64], ids=["none", "wrong"])
def test_without_the_token_nobody_joins_or_submits(cluster, first_run, token):
    mode = "token" if token else "disabled"
    stranger = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": mode}
    for words in (
        ["ray", "job", "submit", "--", "touch", "/tmp/intruder"],
        ["timeout", "60", sys.executable, "-c", "import ray; ray.init('ray://ray-head:10001')"],
        ["timeout", "60", "ray", "start", "--address=ray-head:6379", "--num-cpus=1"],
    ):
        assert cluster.client(*words, **stranger).returncode != 0, words
    count = "import ray; ray.init('auto', logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))"
    nodes = cluster.network["ray-head"].execute(sys.executable, "-c", count)
    assert nodes.stdout.split()[-1:] == ["3"], nodes.stdout + nodes.stderr
    assert not list(cluster.network.folder.glob("*/tmp/intruder"))


def test_a_stopped_job_goes_on_when_it_is_submitted_again(cluster):
    words = ["train", "digits", "--cluster", "compose", *TINY, *GROUP, "name=stopped"]
    job = cluster.submit(*words, "train.steps=1000000")
    wait_until(lambda: list((cluster.volumes / "runs").glob("stopped-*/train/step_*/meta.json")), 600)
    told = cluster.client("ddpm", "jobs", "stop", job)
    assert told.returncode == 0 and "stopped; the same submit continues" in told.stdout, told
    run = cluster.run_directory("stopped")
    stopped = read_losses(run)[-1][0]
    assert (run / "train" / f"step_{stopped:08d}").exists() and not list(run.glob(".stop*")), "it was killed"
    cluster.wait_for_job(cluster.submit(*words, f"train.steps={stopped + 5}"))
    assert [step for step, _ in read_losses(run)] == list(range(1, stopped + 6))


def heartbeat(run: Path) -> int:
    return int((run / ".step").read_text() or 0) if (run / ".step").exists() else 0


def test_a_worker_and_the_tracking_server_go_in_mid_run_and_it_still_ends_right(cluster, first_run, tmp_path):
    job = cluster.submit("train", "digits", "--cluster", "compose", *LONG, *GROUP)
    runs = cluster.volumes / "runs"
    wait_until(lambda: list(runs.glob("interrupted-*/train/step_*/meta.json")), 600)
    run = cluster.run_directory("interrupted")
    before = heartbeat(run)
    cluster.network["worker-2"].kill()
    cluster.network["mlflow"].stop(cluster.services["mlflow"])
    wait_until(lambda: heartbeat(run) > before + 200, 400)  # on the one host that is left
    assert before < 900, "the run was over before anything broke"
    cluster.up("mlflow")
    log = cluster.wait_for_job(job)
    print(log)
    assert "takes nothing" in log  # a person is told that the server was away

    there = cluster.on_tracking_server("interrupted")
    assert there["status"] == "FINISHED"
    assert [tuple(point) for point in there["points"]["loss/train"]] == read_losses(run)
    assert [step for step, _ in read_losses(run)] == list(range(10, 1201, 10))
    alone = read_losses(train_here(LONG, tmp_path))  # the order of sums differs, over 1,200 steps
    assert read_losses(run) == [(step, pytest.approx(loss, rel=0.02)) for step, loss in alone]


def test_what_mlflow_holds_comes_back_from_a_backup(cluster, first_run):
    before = cluster.on_tracking_server("tiny")
    cluster.run("backup")
    cluster.network["mlflow"].stop(cluster.services["mlflow"])
    drop = "--command=DROP SCHEMA public CASCADE; CREATE SCHEMA public"
    lost = ["psql", "--host=127.0.0.1", "--username=mlflow", "mlflow", drop]
    told = cluster.network["postgres"].execute(*lost, PGPASSWORD=cluster.env["POSTGRES_PASSWORD"])
    assert told.returncode == 0, told.stderr
    for folder in (cluster.volumes / "mlartifacts").iterdir():
        shutil.rmtree(folder)
    cluster.run("restore")
    cluster.up("mlflow")
    assert cluster.on_tracking_server("tiny") == before


# Last, when everything has been written


def test_secrets_are_nowhere_but_in_the_environment(cluster, first_run, tmp_path):
    drawn = {name: value for name, value in cluster.env.items() if len(value) == 64}
    assert len(drawn) == 6
    shown = cluster.client("ddpm", "show", "digits", "--cluster", "compose", *EXPERIMENT)
    assert shown.returncode == 0
    places = {
        "ddpm show": shown.stdout + shown.stderr,
        "the job's output": first_run,
        "MLflow": json.dumps(cluster.on_tracking_server("tiny")),
    }
    looked = [*cluster.volumes.glob("runs/**/*"), *cluster.volumes.glob("mlartifacts/**/*")]
    looked += [*cluster.network.folder.glob("*/service.log"), *cluster.network.folder.glob("*/tmp/ray/**/*")]
    read = [path for path in looked if path.is_file() and not path.is_symlink()]
    assert len([path for path in read if "/logs/" in str(path)]) > 20
    for name, secret in drawn.items():
        assert [place for place, text in places.items() if secret in text] == [], name
        found = [str(path) for path in read if secret.encode() in path.read_bytes()]
        assert found == [], name
    dump = cluster.network["postgres"].execute("pg_dump", "--host=127.0.0.1", "--username=mlflow", "mlflow")
    assert "loss/train" in dump.stdout
    assert [name for name, secret in drawn.items() if secret in dump.stdout] == []
    shutil.rmtree(tmp_path)
