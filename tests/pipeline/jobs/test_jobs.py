"""What is refused before anything is sent, what is sent, and how a cluster's answers are worded; no cluster."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
from conftest import ROOT
from ray.job_submission import JobDetails

from pipeline import config
from pipeline.cli.program import main
from pipeline.errors import ConfigError
from pipeline.jobs import job_commands, package, ray_client

HERE, PACKAGES = "cluster.storage=/data/runs", ("ddpm", "pipeline")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No test reaches a cluster that happens to run on this machine, nor a person's token."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("given", "variables", "address"), [
    (None, {}, "http://127.0.0.1:8265"),
    ("head:8265", {"RAY_API_SERVER_ADDRESS": "http://other:1"}, "http://head:8265"),
    (None, {"RAY_API_SERVER_ADDRESS": "https://a/ray/", "RAY_ADDRESS": "http://b"}, "https://a/ray"),
    (None, {"RAY_ADDRESS": "http://b:8265"}, "http://b:8265"),
    (None, {"RAY_ADDRESS": "auto"}, "http://127.0.0.1:8265"),
    (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "is no web address"),
    (None, {"RAY_ADDRESS": "ray://head:10001"}, "is no web address"),
])  # fmt: skip
def test_the_address(monkeypatch, given, variables, address):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=address) if address == "is no web address" else nullcontext():
        assert ray_client.resolve_address(given) == address


def write(*names: str, text: str = "x") -> None:
    for path in map(Path, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_code_and_configurations_travel_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("runs/a/x.tar", "data/batch.bin", ".venv/lib/x.py", "conf/notes.txt", "conf/big/x.yaml", ".env")
    Path("conf/own.yaml").write_text("base: digits\n")
    with package.create_package(["run", "own"], "abc") as packed:
        files = [path for path in packed.folder.rglob("*") if path.is_file()]
        assert packed.bytes == sum(file.stat().st_size for file in files)
        sent = {str(file.relative_to(packed.folder)) for file in files}
    code = {str(path.relative_to(ROOT)) for part in PACKAGES for path in (ROOT / part).rglob("*.py")}
    shipped = {f"pipeline/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    own = {"conf/own.yaml", "pipeline/COMMIT"}
    assert code | shipped | own <= sent
    rest = sent - code - shipped - own - {"ddpm/py.typed"}
    assert not [name for name in rest if not name.startswith("pipeline/")], rest
    assert not [name for name in sent if name.endswith((".pyc", ".tar", ".bin", ".txt", ".env"))]
    assert packed.bytes < 2e6 and not packed.folder.exists()
    Path("conf/huge.yaml").write_text("#" * (package.LIMIT + 1))
    with pytest.raises(ConfigError, match=r"conf/huge\.yaml has 4\.0 MB"):
        package.create_package(["run"], None).__enter__()


def test_names_and_paths_mean_there_what_they_mean_here(tmp_path, monkeypatch):
    """An experiment by path whose base lies beside it, whose own base is in ./conf and hides one that is shipped."""
    monkeypatch.chdir(tmp_path)
    write("conf/digits.yaml", text="seed: 7\n" + (ROOT / "conf" / "digits.yaml").read_text())
    write("study/beside.yaml", text="base: digits\ntrain:\n  steps: 11\n")
    write("study/mine.yaml", text="base: beside\ntrain:\n  batch_size: 13\n")
    here = config.to_yaml(config.load_experiment("study/mine.yaml", []))
    assert "seed: 7" in here and "steps: 11" in here and "batch_size: 13" in here
    with package.create_package(["run", "study/mine.yaml"], "0123abc+") as packed:
        words = shlex.split(packed.entrypoint)
        assert words[:5] == ["exec", "python", "-m", "pipeline", "run"]
        assert words[-1] == "cluster.ray_address=auto"
        code = (
            "import sys; from pipeline import config; from pipeline.engine import code; "
            "print(code.find_commit()); print(config.to_yaml(config.load_experiment(sys.argv[1], [])))"
        )
        how = {"cwd": packed.folder, "env": {**os.environ, "PYTHONPATH": str(packed.folder)}}
        seen = subprocess.check_output([sys.executable, "-c", code, words[5]], **how, text=True)
    assert seen.strip() == f"0123abc+\n{here.strip()}"
    write("mine.yaml", text="base: cifar10\ndata:\n  path: images\n")
    assert main(["submit", "--", "run", "mine.yaml", HERE]) == 2, "a relative path in a file"
    write("mine.yaml", text="base: local\n")
    for words in (["run", "--cluster", "mine.yaml"], ["run", "--cluster=mine.yaml"]):
        with package.create_package(words, None) as packed:
            (name,) = (word.split("=")[-1] for word in shlex.split(packed.entrypoint) if "mine.yaml" in word)
            assert (packed.folder / name).read_text() == "base: local\n"


class Handler(BaseHTTPRequestHandler):
    log_message = lambda *_: None  # noqa: E731

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path} {self.headers.get('Authorization')}")
        status, body = self.server.answers.get(self.path, (404, "nothing here"))
        if not status:
            return time.sleep(3)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_PUT = do_GET


def serve(answers: dict[str, tuple[int, str]]) -> HTTPServer:
    http = HTTPServer(("127.0.0.1", 0), Handler)
    http.answers, http.asked, http.address = answers, [], f"127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    return http


def answers(ray_version: str = ray.__version__, python: str = "3.11.7", of_a_program: bool = False):
    cluster = {"rayVersion": ray_version, "pythonVersion": python, "rayInitCluster": of_a_program}
    return {
        "/api/version": (200, json.dumps({"version": "4", "ray_version": ray_version})),
        "/api/v0/cluster_metadata": (200, json.dumps({"data": cluster})),
    }


@pytest.mark.parametrize(("says", "message"), [
    (answers("2.9.3"), "runs Ray 2.9.3; 2.60 or newer is needed"),
    (answers(python="3.9.1"), "runs Python 3.9.1; 3.11 or newer is needed"),
    (answers(of_a_program=True), "belongs to a program that is running there"),
    ({"/api/version": (401, "Unauthorized")}, "wants a token, and there is none"),
    ({"/api/version": (403, "Forbidden")}, "does not accept the token"),
    ({}, "is no Ray cluster"), ({"/api/version": (200, "<html>")}, "is no Ray cluster"),
    *(({"/api/version": (200, text)}, "is no Ray cluster") for text in ("[]", "null", '{"version": []}')),
    ({"/api/version": (0, "")}, "timed out"),
    ({"/api/version": (503, "later")}, "no Ray cluster answers"),
])  # fmt: skip
def test_a_cluster_that_cannot_take_the_job_is_sent_nothing(capsys, says, message, monkeypatch):
    """One on this machine is asked directly, whatever proxy there is, and not for ever."""
    for name in ("no_proxy", "http_proxy"):
        monkeypatch.setenv(name, proxy := "" if name == "no_proxy" else "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), proxy)
    monkeypatch.setattr(ray_client, "HTTP_SECONDS", 0.3)
    http = serve(says)
    assert main(["submit", "--address", http.address, "--", "run", "digits", HERE]) == 1
    error = capsys.readouterr().err
    assert message in error and http.address in error and len(error.splitlines()) == 1
    if message in ("is no Ray cluster", "timed out"):
        assert main(["jobs", "--address", http.address]) == 1 and message in capsys.readouterr().err
    assert http.asked and all(line.startswith("GET /api/v") for line in http.asked)


def test_another_version_that_works_is_said_and_the_oldest_ones_are_those_that_were_tested():
    with ray_client.connect_cluster(serve(answers("2.61.0", python="3.12.1")).address) as cluster:
        lines = ray_client.check_versions(cluster)
    assert "runs Ray 2.61.0" in lines[0] and "runs Python 3.12.1" in lines[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={ray_client.OLDEST['Python']}"
    assert f"ray[default,train]>={ray_client.OLDEST['Ray']}" in project["dependencies"]
    tested = dict(re.findall(r"(?m)^(\S+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text().lower()))
    floors = [re.match(r"([\w-]+)(\[.*\])?>=(.*)", need) for need in project["dependencies"]]
    assert {floor[1]: floor[3] for floor in floors} == {floor[1]: tested[floor[1]] for floor in floors}


@pytest.mark.parametrize(("variables", "sent"), [
    ({"RAY_AUTH_TOKEN": "a-token"}, "Bearer a-token"),
    ({"RAY_AUTH_TOKEN_PATH": "token"}, "Bearer from-a-file"),
    ({"RAY_AUTH_TOKEN": "a-token", "RAY_AUTH_MODE": "disabled"}, "None"),
])  # fmt: skip
def test_ray_finds_the_token_and_sends_it_and_torch_stays_away(tmp_path, variables, sent):
    """In a process of its own: Ray reads these when it is imported."""
    (tmp_path / "token").write_text("from-a-file\n")
    http = serve(answers(of_a_program=True))
    command = ["submit", "--address", http.address, "--", "run", "digits", HERE]
    code = f"import sys; from pipeline.cli.program import main; main({command}); assert 'torch' not in sys.modules"
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT), **variables}}
    outcome = subprocess.run([sys.executable, "-c", code], **how, capture_output=True, text=True)
    assert http.asked and all(line.endswith(sent) for line in http.asked)
    assert outcome.returncode == 0, outcome.stderr
    assert "a-token" not in outcome.stdout + outcome.stderr


def test_a_log_that_breaks_off_comes_again_and_is_written_once(capsys, monkeypatch):
    connections = iter((["one\n", "two\n"], ["one\ntwo\nthr"], ["one\ntwo\nthree\n", "four\n"]))

    class Log:
        async def tail_job_logs(self, name):
            for text in (texts := next(connections)):
                yield text
            if "four\n" not in texts:
                raise RuntimeError("the connection is lost")

        def get_job_info(self, name):
            return JobDetails(type="SUBMISSION", status="SUCCEEDED", entrypoint="x")

    monkeypatch.setattr(ray_client.time, "sleep", lambda seconds: None)
    assert ray_client.follow_log(ray_client.JobCluster(Log(), "http://head", ""), "a").status == "SUCCEEDED"
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize(("status", "exit_code", "code", "words"), [
    ("SUCCEEDED", 0, 0, "done"), ("STOPPED", None, 130, "the same submit continues"),
    ("FAILED", 130, 130, "the same submit continues"), ("FAILED", 1, 1, "exit code 1"),
    ("FAILED", 2, 2, "exit code 2"), ("FAILED", -9, 1, "exit code -9"),
    ("FAILED", 127, 1, "no `python` on its PATH"), ("FAILED", None, 1, "the node died"),
])  # fmt: skip
def test_the_exit_code_is_that_of_the_job(status, exit_code, code, words):
    facts = {"driver_exit_code": exit_code, "message": "Oh.\nthe node died", "entrypoint": "x"}
    found, sentence = job_commands.describe_end(JobDetails(type="SUBMISSION", status=status, **facts))
    assert found == code and words in sentence


def test_a_python_without_the_libraries_says_so_and_a_fault_of_ours_is_none(monkeypatch):
    code = "import sys; sys.modules['torch'] = None; from pipeline.cli.program import main; sys.exit(main(['run']))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 1
    assert "has no module torch: install this program for it" in outcome.stderr
    monkeypatch.setitem(sys.modules, "pipeline.engine.execute", None)
    with pytest.raises(ModuleNotFoundError):
        main(["run"])
