"""`ddpm submit` and `ddpm jobs`: each function is one command and returns its exit code."""

from __future__ import annotations

import re
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path

from pipeline.config import ClusterConfig
from pipeline.config.sections import FILE_NAME
from pipeline.console import say
from pipeline.errors import ConfigError, PipelineError
from pipeline.jobs.client import check_versions, connect, follow_log
from pipeline.jobs.format import describe_end, format_job, format_jobs
from pipeline.jobs.package import check_paths, pack

# How long a stopped job may take to reach a safe point and write its checkpoint before it is killed; Ray's 3
# seconds are less than many a training step.
STOP_SECONDS = 300


def submit(
    words: list[str],
    cluster: ClusterConfig,
    relative: list[str],
    address: str | None,
    name: str,
    follow: bool,
) -> int:
    """Send the command `words` as a job and, with `follow`, write its log and end as it ends.

    words: a command line without the program's name, whose configuration was checked; relative: its paths that
    would mean another place on the cluster. Raises ConfigError, PipelineError before anything is sent.
    """
    from pipeline.engine.provenance import commit

    check_paths(relative, cluster)
    if not name:  # 'run-cifar10-20260131-235959'
        named = [Path(word).stem for word in words[:2] if not word.startswith("-") and "=" not in word]
        name = "-".join([*named, datetime.now().strftime("%Y%m%d-%H%M%S")])
    if not re.fullmatch(FILE_NAME, name):
        raise ConfigError(f"--id {name} names a file: letters, digits, '.', '_' and '-' only")
    with pack(words, commit()) as package, connect(address, name) as there:
        for difference in check_versions(there):
            say(difference)
        there.client.submit_job(
            entrypoint=package.entrypoint,
            submission_id=name,
            runtime_env={
                "working_dir": str(package.folder),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
            },
            metadata={"command": shlex.join(["ddpm", *words])},
        )
    say(f"submitted to {there.name} as {name} ({package.bytes / 1e6:.1f} MB of code and configurations)")
    if follow:
        say("Ctrl-C leaves it running")
        return show_log(name, address, follow=True)
    say(
        f"`ddpm jobs logs {name} --follow{there.option}` follows it, `ddpm jobs stop {name}{there.option}` stops it"
    )
    return 0


def list_jobs(address: str | None) -> int:
    """Print the jobs that were submitted to the cluster, oldest first."""
    with connect(address) as there:
        jobs = [job for job in there.client.list_jobs() if job.type == "SUBMISSION"]
    jobs.sort(key=lambda job: job.start_time or 0)
    print(format_jobs(jobs) if jobs else f"no jobs on {there.name} yet; `ddpm submit -- run` makes one")
    return 0


def show_log(name: str, address: str | None, follow: bool) -> int:
    """Print a job's log, with `follow` until it ends; its exit code then is this one. Ctrl-C leaves it alone."""
    with connect(address, name) as there:
        try:
            log = "" if follow else there.client.get_job_logs(name)
            job = follow_log(there, name) if follow else None
        except KeyboardInterrupt:
            print(f"\nthe job goes on; stop it with `ddpm jobs stop {name}{there.option}`", file=sys.stderr)
            return 130
    if job is None:
        print(log, end="")
        return 0
    code, end = describe_end(job)
    say(f"job {name}: {end}")
    return code


def show_status(name: str, address: str | None) -> int:
    """Print the facts of one job."""
    with connect(address, name) as there:
        job = there.client.get_job_info(name)
    print(format_job(job))
    return 0


def stop(name: str, address: str | None) -> int:
    """Stop a job and wait until it has reached a safe point. Raises PipelineError where it ended before."""
    with connect(address, name) as there:
        job = there.client.get_job_info(name)
        if job.status.is_terminal():
            raise PipelineError(f"job {name} runs no more: {describe_end(job)[1]}")
        say(f"{name}: stopping at the next safe point")
        there.client.stop_job(name)
        while not (job := there.client.get_job_info(name)).status.is_terminal():
            time.sleep(0.5)
    say(f"{name}: {describe_end(job)[1]}")
    return 0
