"""What people read about jobs."""

from __future__ import annotations

import shutil
import time
from datetime import datetime

from ray.job_submission import JobDetails, JobStatus

from pipeline.console import duration
from pipeline.jobs.service import last_line


def outcome(job: JobDetails) -> tuple[int, str]:
    """The exit code of an ended job as that of the command here, and what happened, in words."""
    code = job.driver_exit_code
    if job.status == JobStatus.SUCCEEDED:
        return 0, "done"
    if job.status == JobStatus.STOPPED or code == 130:
        return 130, "stopped; the same submit goes on from what is on disk"
    if code is None:
        return 1, f"failed: {last_line(job.message or '')}"
    if code == 127:
        return 1, "failed: the cluster has no `python` on its PATH"
    return (code if code in (1, 2) else 1), f"failed with exit code {code}"


def table(jobs: list[JobDetails]) -> str:
    from rich.console import Console
    from rich.table import Table

    shown = Table("id", "status", "started", "took", "command")
    for job in jobs:
        shown.add_row(str(job.submission_id), _status(job), _started(job), _took(job), _command(job))
    console = Console(width=max(100, shutil.get_terminal_size().columns), markup=False)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().rstrip()


def details(job: JobDetails) -> str:
    """One job, a line for each fact."""
    facts = {
        "job": job.submission_id,
        "command": _command(job),
        "status": outcome(job)[1] if job.status.is_terminal() else _status(job),
        "started": _started(job),
        "took": _took(job),
    }
    return "\n".join(f"{what:>8}: {fact}" for what, fact in facts.items())


def _status(job: JobDetails) -> str:
    return job.status.value.lower()


def _command(job: JobDetails) -> str:
    """What a person typed, or the shell command of a job that was submitted otherwise."""
    return (job.metadata or {}).get("command") or job.entrypoint


def _started(job: JobDetails) -> str:
    return datetime.fromtimestamp((job.start_time or 0) / 1000).strftime("%Y-%m-%d %H:%M:%S")


def _took(job: JobDetails) -> str:
    end = job.end_time / 1000 if job.end_time else time.time()
    return duration(max(0.0, end - (job.start_time or 0) / 1000))
