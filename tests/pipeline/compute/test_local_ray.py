"""The Ray of one command: who gets in, what listens, what a signal to all of its processes does, what it leaves."""

import os
import signal
import subprocess
import sys

import grpc
import psutil
import pytest

from pipeline.compute.local_ray import require_ray
from pipeline.errors import PipelineError

pytestmark = pytest.mark.ray

COMMAND = """
import os, signal
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
from pipeline.compute.local_ray import ENVIRONMENT, end_local_ray, start_local_ray
os.environ.update(ENVIRONMENT)
processes = start_local_ray()
import ray
print(ray.get_runtime_context().gcs_address, flush=True)
input()
print(ray.get(ray.remote(lambda: "still here").remote()), flush=True)
end_local_ray(processes)
"""


def test_a_local_ray_wants_its_token_listens_on_the_loopback_outlives_signals_and_ends_whole(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as command:  # fmt: skip
        address = command.stdout.readline().strip()
        family = psutil.Process(command.pid).children(recursive=True)
        everybody = [psutil.Process(command.pid), *family]
        sockets = [s for one in everybody for s in one.net_connections("inet") if s.status == "LISTEN"]
        assert {s.laddr.ip.removeprefix("::ffff:") for s in sockets} == {"127.0.0.1"}
        token = family[0].environ()["RAY_AUTH_TOKEN"]
        assert len(token) == 64 and not any(token in " ".join(one.cmdline()) for one in everybody)
        refused = pytest.raises(grpc.RpcError, match="UNAUTHENTICATED")
        with grpc.insecure_channel(address) as stranger, refused:
            stranger.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=10)
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.killpg(command.pid, number)
        assert command.communicate("\n", timeout=60)[0] == "still here\n" and command.returncode == 0
        assert not psutil.wait_procs(family, timeout=0)[1]
    assert not (tmp_path / ".ray").exists(), "the token stands in a file"


def test_a_ray_that_was_killed_is_missed():
    with subprocess.Popen(["sleep", "60"]) as daemon:
        processes = {psutil.Process(daemon.pid)}
        require_ray(processes)
        daemon.kill()
        os.waitid(os.P_PID, daemon.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(PipelineError, match="the same command continues"):
            require_ray(processes)
