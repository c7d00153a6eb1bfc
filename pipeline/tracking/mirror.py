"""The mirror itself: the thread that follows the files, and the memory of what arrived."""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.store import files as rundir
from pipeline.store.run import Place
from pipeline.tracking.parcels import Parcel, parcels
from pipeline.tracking.session import VIEW, Child, Session, default_uri, reason, shown

logger = logging.getLogger(__name__)

POLL, LONGEST_WAIT = 2.0, 60.0  # seconds between looks at the files; ceiling of the back-off
STATE = "tracking.json"


class Mirror:
    """Follows a run directory into MLflow, on a thread of its own, until it is stopped.

        with Mirror(uri, study, experiment, run) as mirror: ...

    It never raises, and no work waits for a server: `warn` is told once that the server does not answer. The
    block's end sets the status: FINISHED, FAILED (an exception) or KILLED (an interruption).
    """

    def __init__(
        self,
        uri: str,
        study: str,
        experiment: Experiment,
        run: Place,
        tags: dict[str, str] | None = None,
        warn: Callable[[str], None] = logger.warning,
        child: Child | None = None,
    ):
        self.child, self.state_file = child, child.state if child else run.path / STATE
        self.uri, self.study, self.experiment, self.run, self.tags = uri, study, experiment, run, tags or {}
        self.warn, self.status, self.warned = warn, "RUNNING", False
        self.session: Session | None = None
        self.sent: list[str] = []
        self._state = _read_state(self.state_file)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)

    def __enter__(self) -> Mirror:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.stop("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")

    def start(self) -> None:
        self._set_status("RUNNING")
        self._thread.start()

    def stop(self, status: str) -> None:
        """Deliver the rest, with one last attempt, and set the status."""
        self._set_status(status)
        self._stopping.set()
        self._thread.join()

    def _set_status(self, status: str) -> None:
        self.status = status
        self._state |= {"status": status, "time": time.time_ns() // 1_000_000}
        self._save_state()

    def _save_state(self) -> None:
        rundir.write_json(self.state_file, self._state)

    def _follow(self) -> None:
        wait = 0.0
        while not self._stopping.wait(wait):
            wait = POLL if self._attempt() else min(max(2 * wait, POLL), LONGEST_WAIT)
        if not self._attempt():
            again = f"`ddpm sweep {self.study}`" if self.child else _sync_command(self.run, self.uri)
            self.warn(f"not everything reached {shown(self.uri)}: deliver it with {again}")

    def _attempt(self) -> bool:
        """Deliver what is outstanding; whether the server took it."""
        try:
            self.deliver()
        except FileNotFoundError:
            return True  # as in `deliver`, while it was listed
        except Exception as error:  # whatever a server or its client comes up with, the work goes on
            self.session = None
            if not self.warned:
                self.warn(
                    f"the tracking server {shown(self.uri)} takes nothing ({reason(error)}); "
                    "the work goes on, and what is missing there is delivered when it is back"
                )
            self.warned = True
            logger.debug("tracking", exc_info=True)
            return False
        return True

    def deliver(self) -> None:
        """Send every parcel whose version the server has not got. Raises what MLflow's client raises."""
        self.session = self.session or Session(self.uri, self.study, self.experiment, self.run, self.child)
        delivered = self._delivered(self.session)
        for parcel in self._parcels(delivered):
            if delivered.get(parcel.name) == parcel.version:
                continue
            with suppress(FileNotFoundError):  # replaced under our hands: the next look finds the new one
                parcel.send(self.session)
                delivered[parcel.name] = parcel.version
                self.sent.append(parcel.name)
                self._save_state()

    def _parcels(self, delivered: dict[str, str]) -> list[Parcel]:
        send = partial(Session.send_status, status=self.status, end=self._state.get("time"))
        status = Parcel("status", self.status, send)
        rest = list(parcels(self.experiment, self.run, self.tags, delivered, self.child))
        return [status, *rest] if self.status == "RUNNING" else [*rest, status]

    @property
    def is_outstanding(self) -> bool:
        """Whether the files hold anything that never arrived. Asks no server."""
        delivered = self._state.get("servers", {}).get(shown(self.uri), {}).get("parcels", {})
        return any(delivered.get(parcel.name) != parcel.version for parcel in self._parcels(delivered))

    def _delivered(self, session: Session) -> dict[str, str]:
        """Versions by parcel. A run that is new to the server has got nothing."""
        servers = self._state.setdefault("servers", {})
        if servers.get(shown(self.uri), {}).get("run_id") != session.run_id:
            place = {"study": self.study, "experiment_id": session.experiment_id, "run_id": session.run_id}
            servers[shown(self.uri)] = {**place, "parcels": {}}
        return servers[shown(self.uri)]["parcels"]

    def forget(self) -> None:
        """Take nothing for delivered, and the status for what the last driver left behind."""
        self._state.get("servers", {}).pop(shown(self.uri), None)
        self.status = self._state.get("status", "RUNNING")
        if self.status == "RUNNING":  # that driver was killed, or there was none that knew of tracking
            finished = self.run.step_folder(self.experiment.train.steps).exists()
            self.status = self._state["status"] = "FINISHED" if finished else "KILLED"


def _read_state(path: Path) -> dict[str, Any]:
    return rundir.read_json(path) if path.exists() else {}


def sync(uri: str, study: str, experiment: Experiment, run: Place, tags: dict[str, str] | None = None) -> str:
    """Deliver the whole run directory again, and say what was sent. The caller holds the run's lock.

    Raises PipelineError where the server does not answer.
    """
    mirror = Mirror(uri, study, experiment, run, tags)
    mirror.forget()
    try:
        mirror.deliver()
    except Exception as error:
        raise PipelineError(
            f"{run.path} could not be delivered to {shown(uri)} ({reason(error)}); try again later"
        ) from error
    kinds = Counter(name.split()[0] for name in mirror.sent)
    sent = ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())
    return f"{describe(run, uri)}: delivered {sent}"


def describe(run: Place, uri: str | None) -> str:
    """Where a person finds the run in MLflow, and whether it is all there. Reads files only."""
    uri = uri or default_uri(run.storage)
    state = _read_state(run.path / STATE)
    server = state.get("servers", {}).get(shown(uri))
    if server is None:
        return f"nothing in {shown(uri)} yet ({_sync_command(run, uri)})"
    ui = shlex.join(["ddpm", "ui", f"cluster.storage={run.storage}"])
    where = f"{server['study']} / {run.path.name} in {shown(uri)} (`{ui}`)"
    if uri.startswith("http"):
        place = f"#/experiments/{server['experiment_id']}/runs/{server['run_id']}{VIEW}"
        where = f"{shown(uri).rstrip('/')}/{place}"
    behind = server["parcels"].get("status") != state["status"]
    return f"{where}, not up to date ({_sync_command(run, uri)})" if behind else where


def _sync_command(run: Place, uri: str) -> str:
    """What delivers the run to that server, as it can be typed in any folder."""
    other = uri != default_uri(run.storage)
    words = ["ddpm", "sync", str(run.path), *([f"cluster.tracking_uri={shown(uri)}"] if other else [])]
    return f"`{shlex.join(words)}`"
