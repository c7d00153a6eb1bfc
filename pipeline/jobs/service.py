"""The Ray Jobs of a cluster over its web port, with errors in a user's words."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from pipeline.config import suggestion
from pipeline.errors import ConfigError, PipelineError
from pipeline.jobs.luggage import Luggage

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
OLDEST_RAY, OLDEST_PYTHON = (2, 50), (3, 11)  # as in pyproject.toml
HTTP_SECONDS = 30.0
# How long a stopped job may take to reach a safe point and write its checkpoint before it is killed; Ray's 3
# seconds are less than many a training step.
STOP_SECONDS = 300
LOST_SECONDS = 60.0  # how long a log that broke off is asked for again


class _Client(JobSubmissionClient):
    """Ray's client waits for ever for a machine that does not answer."""

    def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": HTTP_SECONDS, **more})


class _Reader:
    """Passes a log on; when it comes again from its start, leaves out what was passed on before."""

    def __init__(self, write: Callable[[str], object]):
        self.write, self.written, self.seen = write, 0, 0

    def take(self, text: str) -> None:
        self.write(text[max(0, self.written - self.seen) :])
        self.seen += len(text)
        self.written = max(self.written, self.seen)


class Service:
    """The jobs of the cluster at `address`. Everything raises PipelineError, with the remedy."""

    def __init__(self, address: str | None = None):
        for noisy in ("modules.dashboard_sdk", "modules.job.sdk", "utils"):
            logging.getLogger(f"ray.dashboard.{noisy}").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env").setLevel(logging.WARNING)
        self.address = resolve_address(address)
        self.shown = _without_password(self.address)
        self.hint = f" --address {self.shown}" if address else ""  # what the next command has to repeat
        with self._in_words():
            self._client = _connected(self.address)

    def differences(self) -> list[str]:
        """Refuse a cluster that cannot take a job, and return a line for each difference from this machine."""
        with self._in_words():
            ray_there = self._ask("/api/version")["ray_version"]
            cluster = self._ask("/api/v0/cluster_metadata").get("data", {})
        if cluster.get("rayInitCluster"):
            raise PipelineError(
                f"the Ray at {self.shown} belongs to a program that is running there and ends with it: give "
                "--address, or start a cluster that stays, with `ray start --head`"
            )
        return _compared(
            self.shown,
            {"Ray": (ray_there, ray.__version__, OLDEST_RAY),
             "Python": (cluster.get("pythonVersion"), platform.python_version(), OLDEST_PYTHON)},
        )  # fmt: skip

    def _ask(self, endpoint: str) -> dict[str, Any]:
        answer = self._client._do_request("GET", endpoint)
        return answer.json() if answer.status_code == 200 else {}

    def submit(self, name: str, luggage: Luggage, command: str) -> None:
        """Send the luggage and start its entrypoint as the job `name`; `command` is what people are shown."""
        with self._in_words(name):
            self._client.submit_job(
                entrypoint=luggage.entrypoint,
                submission_id=name,
                runtime_env={
                    "working_dir": str(luggage.folder),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                },
                metadata={"command": command},
            )

    def all(self) -> list[JobDetails]:
        """The submitted jobs, oldest first."""
        with self._in_words():
            jobs = self._client.list_jobs()
        return sorted(
            (job for job in jobs if job.type == JobType.SUBMISSION), key=lambda job: job.start_time or 0
        )

    def job(self, name: str) -> JobDetails:
        with self._in_words(name):
            return self._client.get_job_info(name)

    def log(self, name: str) -> str:
        with self._in_words(name):
            return self._client.get_job_logs(name)

    def follow(self, name: str, write: Callable[[str], object]) -> JobDetails:
        """Write the log as it grows, from its beginning, and return the ended job.

        A connection that breaks off is made again; the log then comes from its start, and what was written is
        left out.
        """
        self.job(name)
        reader, lost = _Reader(write), 0.0
        while True:
            try:
                asyncio.run(self._tail(name, reader))
                if (job := self.job(name)).status.is_terminal():
                    return job
            except (PipelineError, ClientError, OSError, RuntimeError) as error:
                lost = time.monotonic() if reader.seen or not lost else lost
                if time.monotonic() - lost > LOST_SECONDS:
                    raise PipelineError(
                        f"the connection to {self.shown} is lost; the job may go on: "
                        f"`ddpm jobs logs {name} --follow{self.hint}` looks again"
                    ) from error
            time.sleep(1)

    async def _tail(self, name: str, reader: _Reader) -> None:
        reader.seen = 0
        async for text in self._client.tail_job_logs(name):
            reader.take(text)

    def stop(self, name: str) -> JobDetails:
        """Ask the job to stop at its next safe point, wait for that, and return it."""
        with self._in_words(name):
            self._client.stop_job(name)
        job = self.job(name)
        while not job.status.is_terminal():
            time.sleep(0.5)
            job = self.job(name)
        return job

    @contextmanager
    def _in_words(self, name: str = "") -> Iterator[None]:
        """Turn what Ray's client raises into a PipelineError."""
        try:
            yield
        except AuthenticationError as error:
            raise PipelineError(_token_problem(self.shown, error)) from error
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise self._refusal(str(error), name) from error
        except OSError as error:
            raise PipelineError(
                f"no Ray cluster answers at {self.shown} ({_reason(error)}); start it, or give --address "
                "http://HOST:8265, the port of its dashboard"
            ) from error

    def _refusal(self, text: str, name: str) -> PipelineError:
        if "already exists" in text:
            return ConfigError(
                f"there is already a job '{name}' on {self.shown}: choose another --id, or leave it out (a run "
                "goes on whatever its job is called)"
            )
        if name and "does not exist" in text:
            near = suggestion(name, [str(job.submission_id) for job in self._client.list_jobs()])
            return PipelineError(
                f"no job on {self.shown} is called '{name}'{near}; `ddpm jobs{self.hint}` lists them"
            )
        if name:
            return PipelineError(f"{self.shown} does not take that: {last_line(text)}")
        return PipelineError(f"what answers at {self.shown} is no Ray cluster: {last_line(text)}")


def resolve_address(given: str | None) -> str:
    """The cluster's web address: as given, from Ray's environment variables, or that of this machine."""
    variables = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    for source, address in (("--address", given), *((name, os.environ.get(name)) for name in variables)):
        if not address or (source == "RAY_ADDRESS" and address in ("auto", "local")):
            continue
        if source == "--address" and "://" not in address:
            address = f"http://{address}"
        if not re.match(r"https?://[^/]", address):
            raise ConfigError(
                f"{source}={address} is no web address; jobs go through the dashboard: --address http://HOST:8265"
            )
        return address.rstrip("/")
    return DEFAULT_ADDRESS


def _without_password(address: str) -> str:
    user, _, host = urlsplit(address).netloc.rpartition("@")
    return address.replace(f"{user}@{host}", host) if user else address


def _reason(error: Exception) -> str:
    text = str(error)
    for sign in ("Connection refused", "timed out", "Name or service not known", "No route to host"):
        if sign.lower() in text.lower():
            return sign.lower()
    return last_line(text)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def _connected(address: str) -> _Client:
    """The client, with the token; Ray would put its environment variables before the address."""
    token = _token()
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        return _Client(address, headers={"Authorization": f"Bearer {token}"} if token else {})
    finally:
        os.environ.update(before)


def _token() -> str | None:
    """The cluster's token, from where Ray looks for it."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() or None if path.is_file() else None


def _token_problem(address: str, error: AuthenticationError) -> str:
    remedy = "set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file) to the cluster's"
    if "required" in error.message:
        return f"{address} wants a token, and there is none: {remedy}"
    return f"{address} does not accept the token: {remedy}"


def _compared(address: str, versions: dict[str, tuple[str | None, str, tuple[int, int]]]) -> list[str]:
    """versions: name -> (there, here, the oldest that works); what is not known there is not compared."""
    differences = []
    for what, (there, here, oldest) in versions.items():
        numbers = tuple(int(number) for number in re.findall(r"\d+", there or "")[:2])
        if numbers and numbers < oldest:
            raise PipelineError(
                f"{address} runs {what} {there}; {'.'.join(map(str, oldest))} or newer is needed: update the cluster"
            )
        if there and there != here:
            differences.append(f"{address} runs {what} {there}, this machine {here}: the job gets the former")
    return differences
