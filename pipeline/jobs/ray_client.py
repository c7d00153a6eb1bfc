"""Ray's job client and token, with errors in a user's words. Ray is imported at the first connection."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.console import print_line
from pipeline.errors import (
    ConfigError,
    PipelineError,
    explain_network_error,
    hide_password,
    shorten_error,
    suggest,
)

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
OLDEST = {"Ray": "2.60", "Python": "3.11"}  # as in pyproject.toml
TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file) to the cluster's"
HTTP_SECONDS = (5.0, 30.0)  # to connect, to answer
WAIT_SECONDS = 5.0  # how long a job may wait for its start before the user is told
LOST_SECONDS = 60.0  # how long to ask again for a log that broke off


@dataclass(frozen=True)
class JobCluster:
    """A Ray cluster that takes jobs. name: its address without a password; option: the option that selects it."""

    client: JobSubmissionClient
    name: str
    option: str


@contextmanager
def connect_cluster(address: str | None, job: str = "") -> Iterator[JobCluster]:
    """Open the job client of the cluster at `address`, to ask it about `job`; its errors become PipelineErrors."""
    url = resolve_address(address)
    name = hide_password(url)
    option = f" --address {name}" if address else ""
    # Ray sends a token in this mode alone, which it reads when it is imported.
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray prefers this variable to its argument
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class ClientWithTimeout(JobSubmissionClient):
        """Gives up on a machine that does not answer; Ray's own client would wait for ever."""

        def _do_request(self, method, endpoint, **options):
            return super()._do_request(method, endpoint, **{"timeout": HTTP_SECONDS, **options})

    for noisy in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{noisy}").setLevel(logging.WARNING)
    try:
        yield (cluster := JobCluster(ClientWithTimeout(url), name, option))
    except AuthenticationError as error:
        refused = "failed" in str(error)
        problem = "does not accept the token" if refused else "wants a token, and there is none"
        raise PipelineError(f"{name} {problem}: {TOKEN}") from error
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        if "already exists" in str(error):
            remedy = "choose another --id, or leave it out (a run continues under any job)"
            raise ConfigError(f"there is already a job '{job}' on {name}: {remedy}") from error
        problem = f"{name} is no Ray cluster, or does not take that: {shorten_error(str(error))}"
        if job and "does not exist" in str(error):
            hint = suggest(job, [str(other.submission_id) for other in cluster.client.list_jobs()])
            problem = f"no job on {name} is called '{job}'{hint}; `ddpm jobs{option}` lists them"
        raise PipelineError(problem) from error
    except OSError as error:
        problem = f"no Ray cluster answers at {name} ({explain_network_error(error)})"
        remedy = "start it, or give --address http://HOST:8265, the port of its dashboard"
        raise PipelineError(f"{problem}; {remedy}") from error


def resolve_address(given: str | None) -> str:
    """Return the cluster's web address: as given, from Ray's environment variables, or that of this machine."""
    address = f"http://{given}" if given and "://" not in given else given
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "auto"
    if address in ("auto", "local"):
        return DEFAULT_ADDRESS
    if not re.match(r"https?://[^/]", address):
        remedy = "jobs go through the dashboard: --address http://HOST:8265"
        sources = "--address, RAY_API_SERVER_ADDRESS or RAY_ADDRESS"
        raise ConfigError(f"{hide_password(address)} ({sources}) is no web address; {remedy}")
    return address.rstrip("/")


def check_versions(cluster: JobCluster) -> list[str]:
    """Return a line for each version that differs from this machine's. Raises PipelineError if no job can run."""
    import ray
    from packaging.version import Version

    answer, name = cluster.client._do_request("GET", "/api/v0/cluster_metadata"), cluster.name
    facts = answer.json().get("data", {}) if answer.status_code == 200 else {}
    if facts.get("rayInitCluster"):
        remedy = "give --address, or start a cluster that stays, with `ray start --head`"
        raise PipelineError(f"the Ray at {name} belongs to a program that is running there: {remedy}")
    lines = []
    for what, here in (("Ray", ray.__version__), ("Python", platform.python_version())):
        there, oldest = facts.get(f"{what.lower()}Version", here), OLDEST[what]
        if Version(there) < Version(oldest):
            raise PipelineError(f"{name} runs {what} {there}; {oldest} or newer is needed: update it")
        if there != here:
            lines.append(f"{name} runs {what} {there}, this machine {here}: the job uses {there}")
    return lines


def follow_log(cluster: JobCluster, job: str) -> JobDetails:
    """Print the job's log until the job ends; return its details.

    A broken connection is made again; the log then comes from its start, and lines that were printed are skipped.
    """
    from aiohttp import ClientError

    printed = 0  # characters
    lost = 0.0  # since when no connection gave anything
    begin, is_told = time.monotonic(), False

    async def print_log() -> None:
        nonlocal printed, lost
        seen = 0
        async for text in cluster.client.tail_job_logs(job):
            print(text[max(0, printed - seen) :], end="", flush=True)
            seen += len(text)
            printed, lost = max(printed, seen), 0.0

    cluster.client.get_job_info(job)  # a job that does not exist is refused at once
    while True:
        try:
            if (details := cluster.client.get_job_info(job)).status == "PENDING":  # and has no log
                if not is_told and time.monotonic() - begin > WAIT_SECONDS:
                    print_line(f"{job} waits: {details.message}")
                    is_told = True
            else:
                asyncio.run(print_log())
                if (details := cluster.client.get_job_info(job)).status.is_terminal():
                    return details
        except (ClientError, OSError, RuntimeError) as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > LOST_SECONDS:
                again = f"`ddpm jobs logs {job} --follow{cluster.option}` looks again"
                problem = f"the connection to {cluster.name} is lost; the job may continue: {again}"
                raise PipelineError(problem) from error
        time.sleep(1)
