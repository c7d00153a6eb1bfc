"""The MLflow UI on a storage root's store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

from pipeline.errors import PipelineError, hide_password
from pipeline.tracking import mlflow_client

HOST, STARTING = "127.0.0.1", 120.0  # seconds that a server may take to answer


def serve_ui(storage: Path, port: int, uri: str | None = None) -> int:
    """Run MLflow's server on the store until it is interrupted, and print the link once it answers.

    Raises PipelineError if the port is taken or the server does not start.
    """
    uri = uri or mlflow_client.find_default_uri(storage)
    if uri.startswith("http"):
        print(f"{hide_password(uri)} is a server already: open it in a browser", flush=True)
        return 0
    _require_free_port(port)
    storage.mkdir(parents=True, exist_ok=True)
    # In another process: MLflow's client keeps hundreds of MB, and this one waits for days.
    with ProcessPoolExecutor(1, get_context("fork")) as child:
        tables = child.submit(list_tables, uri).result()
    print(f"starting the MLflow UI on {hide_password(uri)}", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", f"--host={HOST}", f"--port={port}", "--workers=1"]
    command += [f"--artifacts-destination={storage / mlflow_client.ARTIFACTS}"]
    # Its URI may hold a password, and everybody can read a command line.
    secret = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = {**mlflow_client.ENVIRONMENT, **os.environ, **secret}
    with (storage / "mlflow-server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    # The shell reads until this process has ended in any way, and then ends the server.
    end = f"exec 2>&-; cat; kill -TERM -{server.pid} && sleep 5 && kill -KILL -{server.pid}"
    guard = subprocess.Popen(["sh", "-c", end], stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin
    try:
        _wait_for_server(server, f"http://{HOST}:{port}", Path(log.name))
        for name, link in {"all": mlflow_client.VIEW, **tables}.items():
            print(f"{name}: http://{HOST}:{port}/#/experiments{link}", flush=True)
        print("Ctrl-C ends it", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        guard.stdin.close()
        server.wait()
        guard.kill()


def list_tables(uri: str) -> dict[str, str]:
    """List the links to the tables of runs, by the name of their study. Raises PipelineError."""
    mlflow_client.check_server(uri)
    studies = mlflow_client.read_pages(mlflow_client.create_client(uri).search_experiments)
    views = {mlflow_client.TABLE_TAG: mlflow_client.TABLE, mlflow_client.TRIALS_TAG: mlflow_client.TRIALS}
    return {
        study.name: f"/{study.experiment_id}/runs{views[tag]}"
        for study in studies for tag in views if tag in study.tags
    }  # fmt: skip


def _require_free_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PipelineError(
                f"port {port} of {HOST} cannot be used ({error.strerror}); if an MLflow UI runs there, open "
                f"http://{HOST}:{port}, else choose another: `ddpm ui --port {port + 1}`"
            ) from error


def _wait_for_server(server: subprocess.Popen[bytes], link: str, log: Path) -> None:
    end, direct = time.monotonic() + STARTING, build_opener(ProxyHandler({}))
    while time.monotonic() < end and server.poll() is None:
        try:
            with direct.open(f"{link}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise PipelineError(f"the MLflow server did not start; {log} says why")
