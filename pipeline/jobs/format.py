"""What people read about jobs."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING

from pipeline.console import duration, format_table
from pipeline.errors import last_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails


def describe_end(job: JobDetails) -> tuple[int, str]:
    """Return the exit code that an ended job gives the command here, and what happened, in words."""
    code = job.driver_exit_code
    if job.status == "SUCCEEDED":
        return 0, "done"
    if job.status == "STOPPED" or code == 130:
        return 130, "stopped; the same submit goes on from what is on disk"
    if code is None:
        return 1, f"failed: {last_line(job.message or '')}"
    if code == 127:
        return 1, "failed: the cluster has no `python` on its PATH"
    return (code if code in (1, 2) else 1), f"failed with exit code {code}"


def format_jobs(jobs: list[JobDetails]) -> str:
    """Return a table, a row for each job."""
    rows = [(str(job.submission_id), job.status.lower(), *_times(job), _command(job)) for job in jobs]
    return format_table(("id", "status", "started", "took", "command"), rows)


def format_job(job: JobDetails) -> str:
    """Return a line for each fact about one job."""
    started, took = _times(job)
    facts = {
        "job": job.submission_id,
        "command": _command(job),
        "status": describe_end(job)[1] if job.status.is_terminal() else job.status.lower(),
        "started": started,
        "took": took,
    }
    return "\n".join(f"{name:>8}: {fact}" for name, fact in facts.items())


def _command(job: JobDetails) -> str:
    """What a person typed, or the shell command of a job that was submitted otherwise."""
    return (job.metadata or {}).get("command") or job.entrypoint


def _times(job: JobDetails) -> tuple[str, str]:
    """When the job started, and how long it took or has taken so far."""
    start = (job.start_time or 0) / 1000
    end = job.end_time / 1000 if job.end_time else time.time()
    return datetime.fromtimestamp(start).strftime("%Y-%m-%d %H:%M:%S"), duration(max(0.0, end - start))
