"""`ddpm submit` and `ddpm jobs`."""

from __future__ import annotations

import re
import shlex
import sys
from datetime import datetime
from pathlib import Path

from pipeline.config import ClusterConfig
from pipeline.console import say
from pipeline.engine.provenance import commit
from pipeline.errors import ConfigError, PipelineError
from pipeline.jobs import shown
from pipeline.jobs.luggage import check_places, packed
from pipeline.jobs.service import Service


def submit(
    words: list[str],
    cluster: ClusterConfig,
    relative: list[str],
    address: str | None,
    name: str,
    follow: bool,
) -> int:
    """Send the command `words` as a job and return an exit code: with `follow` the job's own.

    words: a command line without the program's name, whose configuration was checked; relative: its paths that
    would mean another place on the cluster. Raises ConfigError, PipelineError before anything is sent.
    """
    check_places(relative, cluster)
    name = name or _name(words)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--id {name} names a file: letters, digits, '.', '_' and '-' only")
    service = Service(address)
    for difference in service.differences():
        say(difference)
    with packed(words, commit()) as luggage:
        service.submit(name, luggage, shlex.join(["ddpm", *words]))
    say(f"submitted to {service.shown} as {name} ({luggage.bytes / 1e6:.1f} MB of code and configurations)")
    if follow:
        say(f"Ctrl-C leaves it running; {_how_to_stop(service, name)}")
        return _follow(service, name)
    say(f"follow it with `ddpm jobs logs {name} --follow{service.hint}`, {_how_to_stop(service, name)}")
    return 0


def _name(words: list[str]) -> str:
    """A job's name from its command and the time: 'run-cifar10-20260131-235959'."""
    named = [Path(word).stem for word in words[:2] if not word.startswith("-") and "=" not in word]
    return "-".join([*named, datetime.now().strftime("%Y%m%d-%H%M%S")])


def _how_to_stop(service: Service, name: str) -> str:
    return f"stop it with `ddpm jobs stop {name}{service.hint}`"


def _follow(service: Service, name: str) -> int:
    """Write the job's log until it ends; returns its exit code. Ctrl-C leaves the job alone."""
    try:
        job = service.follow(name, _write)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; {_how_to_stop(service, name)}", file=sys.stderr)
        return 130
    code, what = shown.outcome(job)
    say(f"job {name}: {what}")
    return code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def listing(address: str | None) -> int:
    service = Service(address)
    jobs = service.all()
    print(shown.table(jobs) if jobs else f"no jobs on {service.shown} yet; `ddpm submit -- run` makes one")
    return 0


def logs(name: str, address: str | None, follow: bool) -> int:
    service = Service(address)
    if follow:
        return _follow(service, name)
    _write(service.log(name))
    return 0


def status(name: str, address: str | None) -> int:
    print(shown.details(Service(address).job(name)))
    return 0


def stop(name: str, address: str | None) -> int:
    """Wait for the job to reach a safe point; a job that ended before is not an error."""
    service = Service(address)
    before = service.job(name)
    if before.status.is_terminal():
        raise PipelineError(f"job {name} runs no more: {shown.outcome(before)[1]}")
    say(f"{name}: stopping at the next safe point")
    say(f"{name}: {shown.outcome(service.stop(name))[1]}")
    return 0
