"""push and pull against a server that speaks S3 (moto's), over HTTP, with the program's own client."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from urllib.request import Request, urlopen

import boto3
import pytest
import torch
from conftest import flip_bit, read_files, tiny_experiment
from moto.server import ThreadedMotoServer

from pipeline.cli.program import main
from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.store import checkpoint, remote, tars
from pipeline.store.files import write_manifest
from pipeline.store.run import list_steps

SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(server, monkeypatch, request):
    """A bucket of the test's own; credentials and address in the environment, as a person sets them."""
    place = {"AWS_ENDPOINT_URL": server, "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (place | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET}).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="runs")
    yield client
    for entry in client.list_objects_v2(Bucket="runs").get("Contents", []):
        client.delete_object(Bucket="runs", Key=entry["Key"])


@pytest.fixture
def run(tiny_run):
    run = tiny_run
    run.experiment_yaml.write_text("name: tiny\n")
    run.log.write_text('{"step": 1}\n{"step": 2}\n')
    for step in (2, 4):
        tensors = {"net.w": torch.full((3,), float(step))}
        checkpoint.save_checkpoint(run.locate_step(step), tensors, tensors, step)
    finished, unfinished = run.path / "samples" / "aaaaaaaaaaaa", run.path / "samples" / "bbbbbbbbbbbb"
    for folder in (finished, unfinished):
        folder.mkdir(parents=True)
        (folder / "00000.tar").write_bytes(b"pixels" * 1000)
        (folder / "sample.yaml").write_text("steps: 20\n")
    write_manifest(finished, ["00000.tar"])
    (run.path / "tracking.json").write_text("{}")
    return run


def objects(s3) -> dict[str, bytes]:
    listed = s3.list_objects_v2(Bucket="runs").get("Contents", [])
    return {entry["Key"]: s3.get_object(Bucket="runs", Key=entry["Key"])["Body"].read() for entry in listed}


def test_what_is_finished_arrives_byte_for_byte_and_what_is_there_does_not_travel_again(run, s3, tmp_path):
    push = partial(remote.push_run, run.path.name, run.storage, "s3://runs/team/a")
    pull = partial(remote.pull_run, f"s3://runs/team/a/{run.path.name}", tmp_path)
    assert ", 0 were there" in push() and ": 0 files sent" in push()
    told = pull()
    there, here = read_files(tmp_path / run.path.name), read_files(run.path)
    stays = ("tracking.json", ".lock", ".sealed.json")
    wanted = {name: here[name] for name in here if "bbbbbbbbbbbb" not in name and not name.endswith(stays)}
    assert {name: there[name] for name in there.keys() - {".lock"}} == wanted
    assert f"{len(wanted)} files fetched, 0 were there" in told
    assert checkpoint.read_meta(tmp_path / run.path.name / "train" / "step_00000004")
    checkpoint.save_checkpoint(run.locate_step(6), {}, {"w": torch.ones(1)}, 6)
    assert ": 3 files sent" in push() and ": 3 files fetched" in pull()
    told = pull()
    assert ": 0 files fetched" in told and "kept" not in told
    run.log.write_text('{"step": 1}\n{"step": 3}\n')
    assert ": 1 files sent" in push()


def test_shards_travel_by_themselves_and_a_folder_is_a_store_too(sharded_storage, tmp_path):
    run, root = make_place(tiny_experiment(), sharded_storage), tmp_path / "root"
    told = remote.push_run(f"data/{run.data.name}", sharded_storage, f"file://{tmp_path}/store/")
    assert ", 0 were there" in told
    remote.pull_run(f"file://{tmp_path}/store/data/{run.data.name}", root)
    folders = (place / "data" / run.data.name for place in (sharded_storage, root))
    ours, theirs = (tars.load_images(folder, "test") for folder in folders)
    assert (ours[0] == theirs[0]).all() and (ours[1] == theirs[1]).all()


def test_a_broken_push_or_pull_leaves_nothing_that_looks_finished(run, s3, monkeypatch, tmp_path):
    push = partial(remote.push_run, run.path.name, run.storage, "s3://runs/a")
    pull = partial(remote.pull_run, f"s3://runs/a/{run.path.name}", tmp_path)
    put, get, moved = remote.ObjectStore.upload, remote.ObjectStore.download, []

    def dies(store, *words):  # a path or a name comes first
        if str(words[0]).endswith("step_00000004/state.safetensors"):
            raise KeyboardInterrupt
        moved.append(str(words[0]))
        return (put if len(words) == 3 else get)(store, *words)

    for method, move in (("upload", push), ("download", pull)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(remote.ObjectStore, method, dies)
            move()
        assert moved[-1].endswith("step_00000004/ema.safetensors")
        if move == push:
            with pytest.raises(PipelineError, match="holds nothing that was pushed"):
                pull()
        assert 4 not in list_steps(tmp_path / run.path.name / "train")
        assert f", {len(moved)} were there" in move()
        moved.clear()
    assert checkpoint.read_meta(tmp_path / run.path.name / "train" / "step_00000004")


def test_damage_is_not_pushed_but_named_and_a_list_of_contents_leads_nowhere_else(run, s3, tmp_path):
    def replace(name: str, body: bytes) -> None:
        s3.put_object(Bucket="runs", Key=f"a/{run.path.name}/{name}", Body=body)
        with pytest.raises(PipelineError, match=r"ema\.safetensors is not what|lies outside"):
            remote.pull_run(f"s3://runs/a/{run.path.name}", tmp_path)
        assert not list(tmp_path.rglob("step_00000004")) and not (tmp_path / "escaped").exists()

    flip_bit(tar := run.path / "samples" / "aaaaaaaaaaaa" / "00000.tar")
    with pytest.raises(PipelineError, match=r"00000.tar does not match its sha256"):
        remote.push_run(run.path.name, run.storage, "s3://runs/a")
    assert objects(s3) == {}
    flip_bit(tar)
    remote.push_run(run.path.name, run.storage, "s3://runs/a")
    ema = "train/step_00000004/ema.safetensors"
    body = objects(s3)[f"a/{run.path.name}/{ema}"]
    replace(ema, body[:-1] + bytes([body[-1] ^ 1]))
    listed = json.loads(objects(s3)[f"a/{run.path.name}/contents.json"])
    listed["files"]["../escaped"] = listed["files"]["log.jsonl"]
    replace("contents.json", json.dumps(listed).encode())


def test_what_was_finished_here_is_kept(run, s3, tmp_path):
    remote.push_run(run.path.name, run.storage, "s3://runs/a")
    shutil.copytree(run.path, tmp_path / run.path.name)
    mine = tmp_path / run.path.name / "samples" / "aaaaaaaaaaaa"
    (mine / "00000.tar").write_bytes(b"mine")
    write_manifest(mine, ["00000.tar"])
    (tmp_path / run.path.name / "log.jsonl").write_text('{"step": 1}\n')
    told = remote.pull_run(f"s3://runs/a/{run.path.name}", tmp_path)
    assert "kept as they are here: samples/aaaaaaaaaaaa" in told
    assert (mine / "00000.tar").read_bytes() == b"mine"
    assert (tmp_path / run.path.name / "log.jsonl").read_text() == run.log.read_text()  # the longer one


def check_credentials(server: str, from_request: float) -> None:
    """Have moto refuse credentials that it did not give out, from that request on."""
    body, header = str(from_request).encode(), {"Content-Type": "text/plain"}
    urlopen(Request(f"{server}/moto-api/reset-auth", body, header)).close()


def test_the_program_names_a_fault_in_a_line_and_no_secret(run, s3, server, tmp_path, monkeypatch, capsys):
    def ddpm(*words: str) -> tuple[int, str]:
        code, told = main([*words, f"cluster.storage={run.storage}"]), capsys.readouterr()
        assert SECRET not in told.out + told.err
        return code, told.err

    name = run.path.name
    check_credentials(server, from_request=0)
    faults = {"set AWS_ACCESS_KEY_ID": ddpm("push", name, "s3://runs/a")}
    check_credentials(server, from_request=float("inf"))
    faults["not-there"] = ddpm("push", name, "s3://not-there/a")
    faults["s3://BUCKET/PREFIX"] = ddpm("push", name, "ftp://runs/a")
    faults["none"] = ddpm("pull", "s3://runs/absent")
    assert ddpm("push", name, "s3://runs/a")[0] == 0
    shutil.rmtree(run.path)
    assert ddpm("pull", f"s3://runs/a/{name}")[0] == 0 and run.experiment_yaml.exists()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    faults["127.0.0.1 port 9"] = ddpm("push", name, "s3://runs/a")
    for word, (code, error) in faults.items():
        assert code == 1 and word in error, error
        assert error.startswith("error: ") and len(error.splitlines()) == 1


@pytest.mark.parametrize("address, words", [
    ("s3://b/p?endpoint_override={}&scheme=http&region=x", "does not answer within 1 s"),
    ("gs://anonymous@b/p?endpoint_override={}&scheme=http", "does not answer within 1 s"),
    ("abfs://c@a.dfs.core.windows.net/p", "set AZURE_TENANT_ID"),
], ids=("s3", "gs", "azure"))  # fmt: skip
def test_a_store_that_does_not_answer_is_not_waited_for(run, address, words):
    code = "import sys; from pipeline.cli.program import main; from pipeline.store import remote; "
    code += "remote.LIMIT = 1; sys.exit(main(sys.argv[1:]))"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = address.format("{}:{}".format(*silent.getsockname()))
        command = [sys.executable, "-c", code, "push", run.path.name, uri, f"cluster.storage={run.storage}"]
        keys = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"), "x")
        environment = {**os.environ, **keys, "no_proxy": "127.0.0.1"}
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 1 and words in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in outcome.stderr
