"""The mirror: a thread that sends the files of a run to MLflow, and the file that remembers what arrived."""

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
from typing import TypedDict

from pipeline.errors import PipelineError, explain_network_error, hide_password
from pipeline.store.files import read_json, write_json
from pipeline.store.run import Place
from pipeline.tracking.mlflow_client import VIEW, Sender, find_default_uri, format_study_url
from pipeline.tracking.parcels import Parcel, list_parcels
from pipeline.tracking.run_sender import ChildRun, RunSender

logger = logging.getLogger(__name__)

POLL, LONGEST_WAIT = 2.0, 60.0  # seconds between looks at the files; ceiling of the back-off


class ServerCopy(TypedDict):
    """The record of one server; parcels: name -> version that arrived."""

    study: str
    experiment_id: str
    run_id: str
    parcels: dict[str, str]


class MirrorState(TypedDict, total=False):
    """The content of tracking.json: how the last driver ended, when (Unix milliseconds), servers by their URI."""

    status: str
    time: int
    servers: dict[str, ServerCopy]


class Mirror(Sender):
    """Copies a run directory to MLflow as it grows, on a thread of its own, until it is stopped.

        with Mirror(uri, study, place) as mirror: ...

    It never raises, and no work waits for a server: it warns once of a server that does not answer. The end of the
    block sets the status: FINISHED, FAILED (an exception) or KILLED (an interruption).
    """

    def __init__(
        self,
        uri: str,
        study: str,
        place: Place,
        tags: dict[str, str] | None = None,
        warn: Callable[[str], None] = logger.warning,
        child: ChildRun | None = None,
    ):
        super().__init__(uri, warn)
        self.study, self.place, self.tags, self.child = study, place, tags or {}, child
        self.status = "RUNNING"
        self.sender: RunSender | None = None
        self.sent: list[str] = []
        self.state_file = child.state_file if child else place.tracking_json
        self._state = _read_state(self.state_file)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._deliver_until_stopped, name="tracking", daemon=True)

    def __enter__(self) -> Mirror:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.stop("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")

    def start(self) -> None:
        """Set the status to RUNNING and begin to send."""
        self._set_status("RUNNING")
        self._thread.start()

    def stop(self, status: str) -> None:
        """Set the status and send what is left, if the server answers once more."""
        self._set_status(status)
        self._stopping.set()
        self._thread.join()

    def _set_status(self, status: str) -> None:
        self.status = self._state["status"] = status
        self._state["time"] = time.time_ns() // 1_000_000
        write_json(self.state_file, self._state)

    def _deliver_until_stopped(self) -> None:
        wait, is_last = 0.0, False
        while not is_last:
            is_last = self._stopping.wait(wait)
            if taken := self.try_send(self.deliver):
                wait = POLL
            else:
                self.sender, wait = None, min(max(2 * wait, POLL), LONGEST_WAIT)
        if not taken:
            again = f"`ddpm sweep {self.study}`" if self.child else _format_sync_command(self.place, self.uri)
            self.warn(f"not everything reached {hide_password(self.uri)}: deliver it with {again}")

    def deliver(self) -> None:
        """Send every parcel whose version the server has not got. Raises what MLflow's client raises."""
        sender = self.sender = self.sender or RunSender(self.uri, self.study, self.place, self.child)
        servers, uri = self._state.setdefault("servers", {}), hide_password(self.uri)
        if uri not in servers or servers[uri]["run_id"] != sender.run_id:  # new to this server
            servers[uri] = ServerCopy(
                study=self.study, experiment_id=sender.experiment_id, run_id=sender.run_id, parcels={}
            )
        delivered = servers[uri]["parcels"]
        with suppress(FileNotFoundError):  # gone while it was listed: the next look finds the new one
            for parcel in self._list_missing(delivered):
                with suppress(FileNotFoundError):
                    parcel.send(sender)
                    delivered[parcel.name] = parcel.version
                    self.sent.append(parcel.name)
                    write_json(self.state_file, self._state)

    def _list_missing(self, delivered: dict[str, str]) -> list[Parcel]:
        send = partial(RunSender.send_status, status=self.status, end=self._state.get("time"))
        status = Parcel("status", self.status, send)
        rest = list(list_parcels(self.place, self.tags, delivered, self.child))
        parcels = [status, *rest] if self.status == "RUNNING" else [*rest, status]
        return [parcel for parcel in parcels if delivered.get(parcel.name) != parcel.version]

    @property
    def is_done(self) -> bool:
        """Tell whether everything that the files hold has arrived. Asks no server."""
        server = self._state.get("servers", {}).get(hide_password(self.uri))
        return not self._list_missing(server["parcels"] if server else {})

    def forget_deliveries(self) -> None:
        """Make the next delivery send everything, and the status as the last driver left it."""
        self._state.get("servers", {}).pop(hide_password(self.uri), None)
        self.status = self._state.get("status", "RUNNING")
        if self.status == "RUNNING":  # that driver was killed, or there was none that knew of tracking
            finished = self.place.step_folder(self.place.experiment.train.steps).exists()
            self.status = self._state["status"] = "FINISHED" if finished else "KILLED"


def _read_state(path: Path) -> MirrorState:
    state: MirrorState = read_json(path) if path.exists() else {}
    return state


def deliver_run(uri: str, study: str, place: Place) -> str:
    """Send the whole run directory again, and return a summary. The caller holds the run's lock.

    Raises PipelineError where the server does not answer.
    """
    mirror = Mirror(uri, study, place)
    mirror.forget_deliveries()
    try:
        mirror.deliver()
    except Exception as error:
        raise PipelineError(
            f"{place.path} could not be delivered to {hide_password(uri)} ({explain_network_error(error)}); "
            "try again later"
        ) from error
    kinds = Counter(name.split()[0] for name in mirror.sent)
    sent = ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())
    return f"{describe_delivery(place, uri)}: delivered {sent}"


def describe_delivery(place: Place, uri: str | None) -> str:
    """Return where the run is in MLflow, and whether it is complete there. Reads files only."""
    uri = uri or find_default_uri(place.storage)
    address, state = hide_password(uri), _read_state(place.tracking_json)
    server = state.get("servers", {}).get(address)
    if server is None:
        return f"nothing in {address} yet ({_format_sync_command(place, uri)})"
    where = f"{format_study_url(uri, place.storage, server['experiment_id'])}/{server['run_id']}{VIEW}"
    is_current = server["parcels"].get("status") == state["status"]
    return where if is_current else f"{where}, not up to date ({_format_sync_command(place, uri)})"


def _format_sync_command(place: Place, uri: str) -> str:
    """Return the command that delivers the run to that server, as it can be typed in any folder."""
    words = ["ddpm", "sync", str(place.path)]
    if uri != find_default_uri(place.storage):
        words.append(f"cluster.tracking_uri={hide_password(uri)}")
    return f"`{shlex.join(words)}`"
