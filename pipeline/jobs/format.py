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
    """Return a table, a row for each job; at least one."""
    facts = [_list_facts(job) for job in jobs]
    return format_table(list(facts[0]), [list(row.values()) for row in facts])


def format_job(job: JobDetails) -> str:
    """Return a line for each fact about one job."""
    facts = _list_facts(job)
    if job.status.is_terminal():
        facts["status"] = describe_end(job)[1]
    return "\n".join(f"{name:>8}: {fact}" for name, fact in facts.items())


def _list_facts(job: JobDetails) -> dict[str, str]:
    """Return what people read about a job. took: so far, of one that runs; command: as a person typed it, or the
    shell command of a job that was submitted otherwise."""
    start = (job.start_time or 0) / 1000
    end = job.end_time / 1000 if job.end_time else time.time()
    return {
        "id": str(job.submission_id),
        "status": job.status.lower(),
        "started": datetime.fromtimestamp(start).strftime("%Y-%m-%d %H:%M:%S"),
        "took": duration(max(0.0, end - start)),
        "command": (job.metadata or {}).get("command") or job.entrypoint,
    }
