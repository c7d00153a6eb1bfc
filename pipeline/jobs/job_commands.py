"""`ddpm submit` and `ddpm jobs`: each function is one command and returns its exit code."""

from __future__ import annotations

import re
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.compute.resources import LEADER_BYTES
from pipeline.config import ClusterConfig
from pipeline.config.sections import FILE_NAME
from pipeline.console import format_duration, format_table, print_line
from pipeline.errors import ConfigError, PipelineError, shorten_error
from pipeline.jobs.package import check_paths, create_package
from pipeline.jobs.ray_client import check_versions, connect_cluster, follow_log
from pipeline.store.files import USER_VARIABLE, name_user

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

# How long a stopped job may take to reach a safe point and write its checkpoint before it is killed; Ray's own 3
# seconds are shorter than many training steps.
STOP_SECONDS = 300


def submit_job(
    words: list[str], cluster: ClusterConfig, relative: list[str], address: str | None, name: str,
    follow: bool,
) -> int:  # fmt: skip
    """Send a checked command as a job; with `follow`, print its log and return its exit code.

    relative: its paths that would mean another place on the cluster. Raises ConfigError, PipelineError before it sends.
    """
    from pipeline.engine.code import find_commit

    check_paths(relative, cluster)
    if not name:  # 'run-cifar10-20260131-235959'
        named = [Path(word).stem for word in words[:2] if not word.startswith("-") and "=" not in word]
        name = "-".join([*named, datetime.now().strftime("%Y%m%d-%H%M%S")])
    if not re.fullmatch(FILE_NAME, name):
        raise ConfigError(f"--id {name} names a file: letters, digits, '.', '_' and '-' only")
    with create_package(words, find_commit()) as package, connect_cluster(address, name) as remote:
        for difference in check_versions(remote):
            print_line(difference)
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), USER_VARIABLE: name_user()}
        remote.client.submit_job(
            entrypoint=package.entrypoint,
            submission_id=name,
            entrypoint_memory=LEADER_BYTES,  # if no node has it free, the job waits
            runtime_env={"working_dir": str(package.folder), "env_vars": variables},
            metadata={"command": shlex.join(["ddpm", *words]), "user": name_user()},
        )
    size = f"{package.bytes / 1e6:.1f} MB of code and configurations"
    print_line(f"submitted to {remote.name} as {name} ({size})")
    if follow:
        print_line("Ctrl-C leaves it running")
        return show_log(name, address, follow=True)
    logs, stop = f"ddpm jobs logs {name} --follow{remote.option}", f"ddpm jobs stop {name}{remote.option}"
    print_line(f"`{logs}` follows it, `{stop}` stops it")
    return 0


def show_jobs(address: str | None) -> int:
    """Print the jobs that were submitted to the cluster, oldest first."""
    with connect_cluster(address) as remote:
        jobs = [job for job in remote.client.list_jobs() if job.type == "SUBMISSION"]
    rows = [_describe_job(job) for job in sorted(jobs, key=lambda job: job.start_time or 0)]
    empty = f"no jobs on {remote.name} yet; `ddpm submit -- run` makes one"
    print(format_table(list(rows[0]), [list(row.values()) for row in rows]) if rows else empty)
    return 0


def show_log(name: str, address: str | None, follow: bool) -> int:
    """Print a job's log; with `follow` until the job ends, and return its exit code. Ctrl-C does not stop the job."""
    with connect_cluster(address, name) as remote:
        try:
            log = "" if follow else remote.client.get_job_logs(name)
            job = follow_log(remote, name) if follow else None
        except KeyboardInterrupt:
            print(f"\nthe job continues; to stop it: `ddpm jobs stop {name}{remote.option}`", file=sys.stderr)
            return 130
    if job is None:
        print(log, end="")
        return 0
    code, end = describe_end(job)
    print_line(f"job {name}: {end}")
    return code


def show_job_status(name: str, address: str | None) -> int:
    with connect_cluster(address, name) as remote:
        job = remote.client.get_job_info(name)
    facts = _describe_job(job)
    if job.status.is_terminal():
        facts["status"] = describe_end(job)[1]
    for what, fact in facts.items():
        print(f"{what:>8}: {fact}")
    return 0


def stop_job(name: str, address: str | None) -> int:
    """Stop a job at a safe point and wait for it. Raises PipelineError if it ended before."""
    with connect_cluster(address, name) as remote:
        job = remote.client.get_job_info(name)
        if job.status.is_terminal():
            raise PipelineError(f"job {name} has ended already: {describe_end(job)[1]}")
        print_line(f"{name}: stopping at the next safe point")
        remote.client.stop_job(name)
        end = time.monotonic() + STOP_SECONDS + 60  # by then Ray has killed it
        while not (job := remote.client.get_job_info(name)).status.is_terminal():
            if time.monotonic() > end:
                raise PipelineError(f"job {name} does not end; look at it with `ddpm jobs status {name}`")
            time.sleep(0.5)
    print_line(f"{name}: {describe_end(job)[1]}")
    return 0


def describe_end(job: JobDetails) -> tuple[int, str]:
    """Return the exit code for an ended job, and a sentence about it."""
    code = job.driver_exit_code
    if job.status == "SUCCEEDED":
        return 0, "done"
    if job.status == "STOPPED" or code == 130:
        return 130, "stopped; the same submit continues from the files on disk"
    if code is None:
        return 1, f"failed: {shorten_error(job.message or '')}"
    if code == 127:
        return 1, "failed: the cluster has no `python` on its PATH"
    return (code if code in (1, 2) else 1), f"failed with exit code {code}"


def _describe_job(job: JobDetails) -> dict[str, str]:
    """Return the columns of a job, {heading: text}; a job of another program shows its shell command."""
    start = (job.start_time or 0) / 1000
    end = job.end_time / 1000 if job.end_time else time.time()
    return {
        "id": str(job.submission_id),
        "status": job.status.lower(),
        "started": datetime.fromtimestamp(start).strftime("%Y-%m-%d %H:%M:%S"),
        "took": format_duration(max(0.0, end - start)),
        "user": (job.metadata or {}).get("user", ""),
        "command": (job.metadata or {}).get("command") or job.entrypoint,
    }
