"""Ray's own job client and token, with errors in a user's words. Ray is imported when a cluster is asked."""

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
OLDEST = {"Ray": "2.50", "Python": "3.11"}  # as in pyproject.toml
TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file) to the cluster's"
HTTP_SECONDS = 30.0
LOST_SECONDS = 60.0  # how long a log that broke off is asked for again


@dataclass(frozen=True)
class Cluster:
    """name: its address without a password; option: what the next command has to repeat to mean it."""

    client: JobSubmissionClient
    name: str
    option: str


@contextmanager
def connect(address: str | None, job: str = "") -> Iterator[Cluster]:
    """Give the cluster at `address` to a body that asks it about `job`.

    What Ray's client raises there becomes a PipelineError with the remedy.
    """
    url = resolve_address(address)
    name = hide_password(url)
    option = f" --address {name}" if address else ""
    # Ray sends a token in this mode alone, which it reads when it is imported.
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray prefers this to its argument
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class PatientClient(JobSubmissionClient):
        """Ray's would wait for ever for a machine that does not answer."""

        def _do_request(self, method, endpoint, **options):
            return super()._do_request(method, endpoint, **{"timeout": HTTP_SECONDS, **options})

    for noisy in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{noisy}").setLevel(logging.WARNING)
    try:
        yield (cluster := Cluster(PatientClient(url), name, option))
    except AuthenticationError as error:
        refused = "failed" in str(error)
        problem = "does not accept the token" if refused else "wants a token, and there is none"
        raise PipelineError(f"{name} {problem}: {TOKEN}") from error
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if "already exists" in str(error):
            raise ConfigError(
                f"there is already a job '{job}' on {name}: choose another --id, or leave it out (a run goes on "
                "whatever its job is called)"
            ) from error
        if not job or "does not exist" not in str(error):
            what = f"{name} is no Ray cluster, or does not take that: {shorten_error(str(error))}"
            raise PipelineError(what) from error
        near = suggest(job, [str(other.submission_id) for other in cluster.client.list_jobs()])
        raise PipelineError(
            f"no job on {name} is called '{job}'{near}; `ddpm jobs{option}` lists them"
        ) from error
    except OSError as error:
        raise PipelineError(
            f"no Ray cluster answers at {name} ({explain_network_error(error)}); start it, or give --address "
            "http://HOST:8265, the port of its dashboard"
        ) from error


def resolve_address(given: str | None) -> str:
    """Return the cluster's web address: as given, from Ray's environment variables, or that of this machine."""
    address = f"http://{given}" if given and "://" not in given else given
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "auto"
    if address in ("auto", "local"):
        return DEFAULT_ADDRESS
    if not re.match(r"https?://[^/]", address):
        raise ConfigError(
            f"{address} (--address, RAY_API_SERVER_ADDRESS or RAY_ADDRESS) is no web address; jobs go through the "
            "dashboard: --address http://HOST:8265"
        )
    return address.rstrip("/")


def check_versions(cluster: Cluster) -> list[str]:
    """Refuse a cluster that cannot take a job; return a line for each version that is not this machine's."""
    import ray
    from packaging.version import Version

    answer = cluster.client._do_request("GET", "/api/v0/cluster_metadata")
    facts = answer.json().get("data", {}) if answer.status_code == 200 else {}
    if facts.get("rayInitCluster"):
        raise PipelineError(
            f"the Ray at {cluster.name} belongs to a program that is running there and ends with it: give "
            "--address, or start a cluster that stays, with `ray start --head`"
        )
    lines = []
    for what, here in (("Ray", ray.__version__), ("Python", platform.python_version())):
        there, oldest = facts.get(f"{what.lower()}Version", here), OLDEST[what]
        if Version(there) < Version(oldest):
            raise PipelineError(
                f"{cluster.name} runs {what} {there}; {oldest} or newer is needed: update the cluster"
            )
        if there != here:
            lines.append(f"{cluster.name} runs {what} {there}, this machine {here}: the job gets the former")
    return lines


def follow_log(cluster: Cluster, job: str) -> JobDetails:
    """Print the job's log as it grows, from its beginning, and return the ended job.

    A connection that breaks off is made again; the log then comes from its start, and what was printed is left out.
    """
    from aiohttp import ClientError

    printed = seen = 0
    lost = 0.0  # since when no connection gave anything

    async def read() -> None:
        nonlocal printed, seen, lost
        seen = 0
        async for text in cluster.client.tail_job_logs(job):
            print(text[max(0, printed - seen) :], end="", flush=True)
            seen += len(text)
            printed, lost = max(printed, seen), 0.0

    cluster.client.get_job_info(job)  # a job that does not exist is refused at once
    while True:
        try:
            asyncio.run(read())
            if (details := cluster.client.get_job_info(job)).status.is_terminal():
                return details
        except (ClientError, OSError, RuntimeError) as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > LOST_SECONDS:
                raise PipelineError(
                    f"the connection to {cluster.name} is lost; the job may go on: "
                    f"`ddpm jobs logs {job} --follow{cluster.option}` looks again"
                ) from error
        time.sleep(1)
