"""Faults of stores, servers and their addresses: MLflow is never claimed, and nothing waits for it."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import Mock
from urllib.request import ProxyHandler, build_opener

import pytest
from conftest import free_port
from mlflow import MlflowClient
from psutil import Process
from synthetic_run import make_run

from pipeline import config, tracking
from pipeline.cli.program import main
from pipeline.engine import execute
from pipeline.errors import PipelineError, explain_network_error, hide_password
from pipeline.store.files import TEMPORARY
from pipeline.tracking import mirror, mlflow_client

STEPS = ("train.steps=100", "train.checkpoint_every=50", "train.log_every=10")
SECRET = "postgresql://u:HUSH@127.0.0.1:9/x?password=HUSH2&sslmode=disable"


@pytest.fixture
def store(tmp_path, empty_store) -> Path:
    return Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))


def find_only_run(root: Path):
    client = MlflowClient(tracking.find_default_uri(root))
    (found,) = client.search_runs([study.experiment_id for study in client.search_experiments()])
    return client, found


@pytest.fixture
def run_again(monkeypatch, tmp_path):
    """The same `ddpm run` on a run whose stages are all done."""
    run = make_run(tmp_path, "digits", STEPS)
    monkeypatch.setattr(execute, "make_place", lambda *_: run)
    monkeypatch.setattr(execute, "list_unfinished_stages", lambda *_: [])
    cluster = config.load_cluster("local", [f"storage={tmp_path}", "workers=0"])
    return run, lambda last="report": execute.run_stages(run.experiment, cluster, last)


def test_the_last_line_and_the_same_command_ask_for_every_parcel(run_again, store, monkeypatch, caplog):
    run, again = run_again
    monkeypatch.setattr(mlflow_client, "PATIENCE", 1)
    tracking.deliver_run(tracking.find_default_uri(store.parent), "digits", run)
    log = run.log.read_text()
    run.log.write_text(log + log.splitlines()[-1].replace("100", "110") + "\n")
    with closing(sqlite3.connect(store, isolation_level=None)) as db:
        db.execute("begin exclusive")
        again()
    assert "another program" in caplog.text or "locked" in caplog.text
    where = tracking.describe_delivery(run, None)
    assert "not up to date" in where and "log" in where and "ddpm sync" in where
    again()
    client, found = find_only_run(store.parent)
    assert "not up to date" not in tracking.describe_delivery(run, None)
    assert "sync" not in where.partition(":")[0]
    assert len(client.get_metric_history(found.info.run_id, "loss/train")) == 11


@pytest.mark.parametrize(("last", "left", "status", "trained"), [
    ("report", "RUNNING", "FINISHED", True),
    ("report", "KILLED", "FINISHED", True),
    ("shard", "FAILED", "FAILED", True),
    ("shard", "RUNNING", "KILLED", False),
    ("sync", "RUNNING", "FINISHED", True),  # its last checkpoint is there
])  # fmt: skip
def test_a_status_that_a_kill_left_is_set_right(run_again, store, last, left, status, trained):
    run, again = run_again
    if not trained:
        shutil.rmtree(run.train)
    uri = tracking.find_default_uri(store.parent)
    driver = tracking.Mirror(uri, "digits", run)
    driver._set_status(left)
    driver.deliver()  # and it is gone
    assert find_only_run(store.parent)[1].info.status == left
    tracking.deliver_run(uri, "digits", run) if last == "sync" else again(last)
    info = find_only_run(store.parent)[1].info
    assert info.status == status and info.end_time >= info.start_time


@pytest.mark.parametrize("name", ["pct%41%20y", "a?mode=ro#c", "100% ü+&;='a@b:c"])
def test_the_store_lies_in_the_root_whatever_it_is_called(tmp_path, empty_store, name, monkeypatch):
    root = tmp_path / name
    root.mkdir()
    shutil.copy(empty_store, root)
    monkeypatch.chdir(tmp_path)
    uri = tracking.find_default_uri(Path(name))
    before = {path.name for path in tmp_path.iterdir()}
    run = make_run(root, "digits", STEPS)
    tracking.deliver_run(uri, "digits", run)
    assert {path.name for path in tmp_path.iterdir()} == before
    with closing(sqlite3.connect(root / "mlflow.db")) as db:
        assert db.execute("select status from runs").fetchall() == [("FINISHED",)]
    assert mlflow_client.find_sqlite_file(uri) == root / "mlflow.db"
    assert (root / "mlartifacts" / "digits").is_dir()


def test_two_first_commands_share_one_store(tmp_path, monkeypatch):
    makers, both = [], threading.Barrier(2, timeout=1)

    def meet(uri: str) -> None:
        if TEMPORARY in uri:
            makers.append(uri)
            with suppress(threading.BrokenBarrierError):
                both.wait()

    monkeypatch.setattr(mlflow_client, "_check_database", meet)
    uri = tracking.find_default_uri(tmp_path)
    with ThreadPoolExecutor() as pool:
        list(pool.map(mlflow_client.create_client, [uri, uri]))
    assert len(makers) == 1  # the second would replace the first one's store, with what that has sent


def revise(store: Path, revision: str) -> str:
    with closing(sqlite3.connect(store)) as db, db:
        db.execute("update alembic_version set version_num = ?", (revision,))
    return f"sqlite:///{store}"


class Denial(BaseHTTPRequestHandler):
    log_message = Mock()

    def do_GET(self) -> None:
        self.send_error(401)

    do_POST = do_GET


def start_server_with_passwords(_) -> str:
    server = HTTPServer(("127.0.0.1", 0), Denial)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(("uri", "words"), [
    (start_server_with_passwords, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASS"),
    (lambda store: revise(store, "cc1f77228345"), "mlflow db upgrade sqlite:///"),
    (lambda store: revise(store, "ffffffffffff"), "install the newer one"),
    (lambda store: store.write_bytes(b"no database" * 99) and f"sqlite:///{store}", "not a database"),
    (lambda store: f"sqlite:///{store.parent}/{'/'.join(['a' * 100] * 9)}/mlflow.db", "unable to open"),
    (lambda store: "sqlite:////proc/x.db", "/proc"),
    (lambda store: SECRET, "connection refused"),
    (lambda store: "http://u:HUSH@127.0.0.1:9", "connection refused"),
    (lambda store: "mysql+nodriver://h/x", "nodriver"),
])  # fmt: skip
def test_a_store_that_cannot_be_opened_costs_seconds_and_gives_the_remedy(store, capfd, caplog, uri, words):
    address, began = uri(store), time.monotonic()
    with pytest.raises(PipelineError, match=r" does not answer .*; \w+.*ddpm sync") as refusal:
        tracking.check_server(address)
    warnings: list[str] = []
    run = make_run(store.parent / "root", "digits", STEPS, scores=False)
    with tracking.Mirror(address, "digits", run, warn=warnings.append):
        pass
    assert time.monotonic() - began < 20
    end = "when it is back" if "connection refused" in words else "once that is repaired"
    for text in (str(refusal.value), warnings[0]):
        assert words in text and "HUSH" not in text and "\n" not in text
    assert end in warnings[0]
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_server_that_freezes_holds_no_end_up(store, monkeypatch):
    monkeypatch.setattr(mirror, "LONGEST_WAIT", 0.2)
    release = threading.Event()
    monkeypatch.setattr(tracking.Mirror, "deliver", lambda self: release.wait(30))
    run = make_run(store.parent, "digits", STEPS, scores=False)
    warnings: list[str] = []
    began = time.monotonic()
    with tracking.Mirror("http://127.0.0.1:9", "digits", run, warn=warnings.append):
        pass
    release.set()
    assert time.monotonic() - began < 10 and "ddpm sync" in warnings[-1]


@pytest.mark.parametrize(("uri", "shown"), [
    ("http://h:5000", "http://h:5000"), ("http://u:HUSH@h:5000/p", "http://h:5000/p"), ("auto", "auto"),
    (SECRET, "postgresql://127.0.0.1:9/x"), ("http://h/?token=HUSH", "http://h/"),
    ("u:HUSH@h:6379", "h:6379"), ("http://u:P/HUSH@h", "http://..."), ("http://u:HUSH#HUSH@h", "http://..."),
    ("http://h/?password=HUSH@HUSH", "http://..."), ("http://u:HUSH://HUSH@h", "http://..."),
    ("sqlite:////a@b/m.db?key=HUSH", "sqlite:////a@b/m.db"),
])  # fmt: skip
def test_no_secret_of_an_address_is_shown(uri, shown):
    assert hide_password(uri) == shown
    assert "HUSH" not in explain_network_error(OSError(f"cannot reach {uri}"), uri)


def test_the_reason_of_a_store_is_not_its_hint_for_programmers():
    error = OSError("(raised as a result of autoflush)\n(sqlite3.OperationalError) disk is full\n[SQL: ...]")
    assert mlflow_client.explain_store_error(error, "sqlite:////x")[0] == "disk is full"


@pytest.mark.parametrize(
    "uri", [SECRET, "sqlite:///a?key=HUSH", "u:HUSH@h", "ftp://u:HUSH@h", "[http://u:HUSH@h]", "{a: HUSH}"]
)
def test_no_command_prints_a_secret(uri, capsys):
    for words in (["show", "digits"], ["submit", "--", "run", "digits", "cluster.storage=/data"]):
        main([*words, f"cluster.tracking_uri={uri}"])
    for words in ("show digits cluster.ray_address=", "jobs --address ", "pull s3://KEY:HUSH@b/p?x="):
        main(f"{words}{uri if '@' in uri else SECRET}".split())
    printed = capsys.readouterr()
    assert "HUSH" not in printed.out + printed.err


STUB = """
import os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"OK")
    def log_message(self, *_): pass
open(os.environ["SEEN"], "w").write(f"{os.environ['MLFLOW_BACKEND_STORE_URI']} {sys.argv}")
if "child" not in sys.argv:  # a worker keeps the port
    port = next(word.partition("=")[2] for word in sys.argv if word.startswith("--port="))
    sys.exit(subprocess.call([sys.executable, __file__, "child", "--port=" + port]))
HTTPServer(("127.0.0.1", int(sys.argv[-1].partition("=")[2])), Answer).serve_forever()
"""
CLIENT = """
import sys
from unittest.mock import MagicMock
weight, MlflowClient, sys.modules["sqlalchemy"] = b"x" * 2**27, MagicMock(), MagicMock()
MlflowClient.return_value.search_experiments.return_value.token = None  # one page
"""
UI = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background ignores it,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this one
from pipeline.cli.program import main
main(["ui", "--port", sys.argv[2], f"cluster.storage={sys.argv[1]}", f"cluster.tracking_uri={sys.argv[3]}"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT])
def test_the_ui_is_small_takes_its_server_along_and_asks_it_directly(tmp_path, number):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "__init__.py").write_text(CLIENT)
    (tmp_path / "mlflow" / "__main__.py").write_text(STUB)
    port = free_port()
    proxy = dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    path = f"{tmp_path}{os.pathsep}{Path(tracking.__file__).parents[2]}"
    environment = {k: v for k, v in os.environ.items() if k.lower() != "no_proxy"} | proxy
    environment |= {"PYTHONPATH": path, "SEEN": str(tmp_path / "seen")}
    words = [sys.executable, "-c", UI, str(tmp_path), str(port), SECRET]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as ui:
        lines = [ui.stdout.readline(), ui.stdout.readline()]
        assert f"http://127.0.0.1:{port}/" in lines[1] and "HUSH" not in "".join(lines)
        assert Process(ui.pid).memory_info().rss < 60e6
        ui.send_signal(number)
        try:
            ui.wait(20)
        finally:
            ui.kill()
    seen, end = (tmp_path / "seen").read_text(), time.monotonic() + 20
    assert "HUSH" not in seen.removeprefix(SECRET) and seen.startswith(SECRET)
    with pytest.raises(OSError):
        while time.monotonic() < end:
            build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/health", timeout=2).close()
            time.sleep(0.1)
