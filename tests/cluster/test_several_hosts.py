"""The topology of docker-compose.yml on hosts of their own: database, tracking server, head, two workers, client.

Each service is started with the very command and environment of the file, the values drawn by `make env`; the health
checks are the file's. A job is submitted from the client, and what it made is read through the tracking server.
"""

import json
import re
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

pytestmark = hosts.MARKS

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
    """The services by host, running."""

    def __init__(self, folder: Path, names: dict[str, str] = NAMES):
        folder.joinpath(".env.example").write_text((ROOT / ".env.example").read_text())
        subprocess.run([sys.executable, ROOT / "deploy" / "make_env.py"], cwd=folder, check=True)
        self.env = read_env(folder / ".env") | {"WORKER_CPUS": "1"}
        self.volumes = folder / "volumes"
        self.network = hosts.Network(folder / "hosts", names)
        of_file = services(self.env)
        self.services = {host: of_file.get(host) or of_file[name] for host, name in names.items()}
        self.services["client"] |= WAIT

    def up(self, *names: str) -> None:
        """Start hosts one after the other, each when the one before is healthy, and say how long that took."""
        for name in names:
            began = time.monotonic()
            self.network[name].start(self.services[name], self.volumes)
            if "healthcheck" in self.services[name]:
                self.network[name].wait_until_healthy(self.services[name]["healthcheck"])
            print(f"{name}: healthy after {time.monotonic() - began:.0f} s", flush=True)

    def run(self, name: str) -> None:
        """Run a service that ends by itself."""
        self.network[name].start(self.services[name], self.volumes)
        process = self.network[name].process
        assert process and process.wait(120) == 0, self.network[name].tail()

    def client(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.network["client"].execute(*command, **environment)

    def submit(self, *words: str) -> str:
        """The id of a job that runs a ddpm command."""
        name = f"test-{secrets.token_hex(4)}"
        told = self.client("ddpm", "submit", "--id", name, "--", *words)
        assert told.returncode == 0, told.stdout + told.stderr
        return name

    def wait_for_job(self, name: str) -> str:
        """Wait for its end; returns its output. Raises AssertionError where it failed."""
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


def test_the_profile_auth_asks_for_a_password_and_a_run_with_it_is_delivered(tmp_path_factory):
    """Before the other cluster, which has the same addresses."""
    names = {"postgres": "postgres", "mlflow-auth": "mlflow", "client": "client"}
    cluster = Cluster(tmp_path_factory.mktemp("auth"), names)
    try:
        cluster.up(*names)
        place = ["--cluster", "compose", "cluster.min_workers=null"]
        words = ["ddpm", "run", "digits", *place, *EXPERIMENT, *ONE_CPU]
        for password in ("", "wrong"):
            told = cluster.client(*words, MLFLOW_TRACKING_PASSWORD=password)
            lines = told.stderr.strip().splitlines()
            assert told.returncode == 1 and "MLFLOW_TRACKING_PASSWORD" in lines[-1] and len(lines) <= 2, lines
        told = cluster.client(*words)
        assert told.returncode == 0, told.stdout + told.stderr
        there, run = cluster.on_tracking_server("tiny"), cluster.run_directory("tiny")
        assert there["status"] == "FINISHED"
        assert [tuple(point) for point in there["points"]["loss/train"]] == read_losses(run)
        files = [*cluster.volumes.rglob("*"), *cluster.network.folder.glob("*/service.log")]
        written = b"".join(file.read_bytes() for file in files if file.is_file())
        for secret in ("MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY"):
            assert cluster.env[secret].encode() not in written, secret
    finally:
        cluster.network.close()


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
    """The output of a job that ran the whole pipeline on both workers."""
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


def test_both_hosts_trained(cluster, first_run):
    """Two workers of one CPU each fit on no single host; each host's Ray kept the log of its own."""
    for worker in ("worker-1", "worker-2"):
        logs = (cluster.network[worker].folder / "tmp").glob("ray/session_2*/logs/worker-*.err")
        told = "".join(log.read_text(errors="replace") for log in logs)
        assert "Setting up process group" in told or "rank=" in told or "TrainWorker" in told, worker


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


ATTACK = """
import json, sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen
job = json.dumps({"entrypoint": "touch /tmp/intruder"}).encode()
asked = [("/api/jobs/", job), ("/api/jobs/", None), ("/api/job_agent/jobs/", job), ("/nodes?view=summary", None),
         ("/api/v0/tasks", None), ("/api/v0/logs", None), ("/worker/traceback?pid=1", None), ("/logs", None)]
for port in sys.argv[1:]:
    for path, body in asked:
        request = Request(f"http://ray-head:{port}{path}", body, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=5) as answer:
                print(json.dumps([port, path, answer.status, answer.read(200).decode(errors="replace")]))
        except HTTPError as error:
            print(json.dumps([port, path, error.code, ""]))
        except Exception as error:
            print(json.dumps([port, path, 0, type(error).__name__]))
"""


def test_without_the_token_no_port_of_the_head_runs_code(cluster, first_run):
    told = cluster.network["ray-head"].execute("ss", "-ltnH").stdout
    ports = {address.rsplit(":", 1)[1] for address in re.findall(r"LISTEN\s+\d+\s+\d+\s+(\S+)", told)}
    assert {"6379", "8265"} <= ports
    told = cluster.client(sys.executable, "-c", ATTACK, *ports)
    answers = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(answers) == 8 * len(ports), told.stderr
    assert {status for port, path, status, _ in answers if port == "8265" and "/jobs" in path} == {401}
    metrics = "# HELP "  # Prometheus's ports answer every path with their gauges
    let_in = [answer for answer in answers if 200 <= answer[2] < 300 and not answer[3].startswith(metrics)]
    assert let_in == []
    assert not list(cluster.network.folder.glob("*/tmp/intruder"))


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


def test_the_tracking_server_answers_to_its_names_alone(cluster):
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    code = (
        "import sys, http.client as h; c = h.HTTPConnection('mlflow', 5000); "
        "c.request('GET', sys.argv[1], headers={'Host': sys.argv[2]}); print(c.getresponse().status)"
    )
    for name, status in (("mlflow:5000", 200), ("evil.example", 403), ("mlflow.evil.example:5000", 403)):
        assert cluster.client(sys.executable, "-c", code, path, name).stdout.strip() == str(status), name


def heartbeat(run: Path) -> int:
    return int((run / ".step").read_text() or 0) if (run / ".step").exists() else 0


def test_a_worker_and_the_tracking_server_go_in_mid_run_and_it_still_ends_right(cluster, first_run, tmp_path):
    job = cluster.submit("train", "digits", "--cluster", "compose", *LONG, *GROUP)
    runs = cluster.volumes / "runs"
    wait_until(lambda: list(runs.glob("interrupted-*/train/step_*/meta.json")), 600)
    run = cluster.run_directory("interrupted")
    before = heartbeat(run)
    # The job's driver runs on one of both, and the job ends with it.
    has_driver = cluster.volumes.parent.glob(f"hosts/worker-2/tmp/ray/*/logs/job-driver-{job}.log")
    cluster.network["worker-1" if list(has_driver) else "worker-2"].kill()
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


def test_secrets_are_nowhere_but_in_the_environment(cluster, first_run, tmp_path):
    """Last, when everything has been written."""
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
