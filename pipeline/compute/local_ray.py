"""Ray on this machine for one command: its start, who may connect, and its end."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress

import psutil

from pipeline.compute.interrupt import shield_children
from pipeline.errors import PipelineError

# Ray reads these when it is imported, and writes none of them into a file or a command line.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # no cluster of several machines: all of it listens on 127.0.0.1
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # do not wait for lost objects
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that tells of machines that will be lost: here is one only
}
DAEMONS = ("gcs_server", "raylet")


def start_local_ray() -> set[psutil.Process]:
    """Start Ray for this command alone; return its processes. Raises RuntimeError, and the errors of Ray."""
    import grpc
    import ray

    me = psutil.Process()
    others = set(me.children())
    try:
        with shield_children():
            # "local": never somebody else's cluster that happens to run here. The dashboard of a cluster that ends
            # with the command would cost two seconds of every start.
            ray.init(
                address="local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False,
                logging_level=logging.ERROR, log_to_driver=False,
            )  # fmt: skip
        with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as stranger:
            ask = stranger.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
            with suppress(grpc.RpcError):
                ask(b"", timeout=10)
                raise RuntimeError("it admits clients without a token")
    except BaseException as error:
        end_local_ray(set(me.children()) - others)
        if isinstance(error, SystemExit):  # by the handler of SIGTERM that Ray has for this time
            raise KeyboardInterrupt from error
        raise
    return set(me.children()) - others


def require_ray(processes: set[psutil.Process]) -> None:
    """Raise PipelineError if Ray has died; otherwise its client would wait, and then end this process."""
    for process in processes:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise PipelineError(f"Ray's process {process.pid} was killed; the same command continues")


def end_local_ray(processes: set[psutil.Process]) -> None:
    """End Ray and its children, which no SIGTERM reaches (`shield_children`)."""
    import ray

    family = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            family += [process, *process.children(recursive=True)]
            if process.name() not in DAEMONS:
                process.kill()  # Ray would wait a second for each
    try:
        ray.shutdown()
    finally:
        for process in psutil.wait_procs(family, timeout=3)[1]:
            process.kill()
