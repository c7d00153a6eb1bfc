"""The mirror: a thread that sends the files of a run to MLflow, and the record of what has arrived."""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from pipeline.errors import PipelineError, hide_password
from pipeline.store.files import read_record, write_json
from pipeline.store.run import Place
from pipeline.tracking import mlflow_client, models
from pipeline.tracking.parcels import Parcel, list_parcels
from pipeline.tracking.run_sender import ChildRun, RunSender, read_mtime

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

logger = logging.getLogger(__name__)

POLL = 2.0  # seconds between looks at the files
LONGEST_WAIT = 60.0  # seconds; ceiling of the back-off and of one parcel


class DeliveryRecord(TypedDict):
    """The record of one server; parcels: name -> version that arrived."""

    study: str
    experiment_id: str
    run_id: str
    parcels: dict[str, str]


class MirrorState(TypedDict, total=False):
    """The content of tracking.json: how the last driver ended, when (Unix milliseconds), servers by their URI."""

    status: str
    time: int
    servers: dict[str, DeliveryRecord]


class Mirror(mlflow_client.Sender):
    """Copies a growing run directory to MLflow, in a separate thread, until it is stopped.

    It never raises, and no work waits for a server: it warns once of one that does not answer. The end of a `with`
    block sets the status: FINISHED, FAILED (an exception) or KILLED (an interruption).
    """

    def __init__(
        self, uri: str, study: str, place: Place, tags: dict[str, str] | None = None,
        warn: Callable[[str], None] = logger.warning, child: ChildRun | None = None, largest_model: float = 0,
    ):  # fmt: skip
        super().__init__(uri, warn)
        self.largest_model = largest_model
        self.study, self.place, self.tags, self.child = study, place, tags or {}, child
        self.sender: RunSender | None = None
        self.sent: list[str] = []
        self.state_file = child.state_file if child else place.tracking_json
        self._state = read_record(self.state_file, MirrorState)
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
        """Set the status, and try once to send the rest."""
        self._set_status(status)
        self._send_rest()

    def send_missing(self, status: str = "") -> None:
        """Send what an earlier command could not, with the status and the time of its end."""
        if self.status == "RUNNING":  # the driver was killed after it had written this
            self._state["time"] = read_mtime(self.place.timings_json)
        self._state["status"] = status or self.last_status
        if self.list_missing():
            self._thread.start()
            self._send_rest()

    def _send_rest(self) -> None:
        """Send the rest; give up a server that has accepted nothing for a minute."""
        self._stopping.set()
        count = -1
        while self._thread.is_alive() and count < len(self.sent):
            count = len(self.sent)
            self._thread.join(LONGEST_WAIT)
        self.is_behind |= self._thread.is_alive()
        if self.is_behind:
            again = f"`ddpm sweep {self.study}`" if self.child else _format_sync_command(self.place, self.uri)
            self.warn(f"not everything reached {hide_password(self.uri)}: deliver it with {again}")

    def _set_status(self, status: str) -> None:
        self._state["status"] = status
        self._state["time"] = time.time_ns() // 1_000_000
        write_json(self.state_file, self._state)

    def _deliver_until_stopped(self) -> None:
        wait, is_last, monitor = 0.0, False, None
        while not is_last:
            is_last = self._stopping.wait(wait)
            if monitor and (is_last or self.is_behind):  # it ends by itself when the server fails
                monitor.finish()
                monitor = None
            self.is_behind = False
            with self.warn_of_errors():
                self.deliver()
                if not (monitor or is_last):
                    monitor = self._watch_machine()
            if self.is_behind:
                self.sender, wait = None, min(max(2 * wait, POLL), LONGEST_WAIT)
            else:
                wait = POLL

    def deliver(self) -> None:
        """Send every parcel whose version the server lacks. Raises the errors of MLflow's client."""
        if not self._has_content:
            return
        sender = self.sender = self.sender or RunSender(self.uri, self.study, self.place, self.child)
        record = self.record
        if record is None or record["run_id"] != sender.run_id:  # new to this server
            place, run = sender.experiment_id, sender.run_id
            record = DeliveryRecord(study=self.study, experiment_id=place, run_id=run, parcels={})
            self._state.setdefault("servers", {})[hide_password(self.uri)] = record
        # A file was deleted while it was listed, or is damaged: the next look finds it made again.
        with suppress(FileNotFoundError, PipelineError):
            for parcel in self.list_missing():
                with suppress(FileNotFoundError, PipelineError):
                    parcel.send(sender)
                    record["parcels"][parcel.name] = parcel.version
                    self.sent.append(parcel.name)
                    write_json(self.state_file, self._state)

    def _watch_machine(self) -> SystemMetricsMonitor | None:
        """Let MLflow log the processor, memory, disk and GPUs of this machine; None before there is a run."""
        if self.sender is None:  # so mlflow, whose import takes seconds, is not needed yet either
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.sender.run_id, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        return monitor

    def list_missing(self) -> list[Parcel]:
        """List the parcels that the server lacks. Asks no server."""
        if not self._has_content:
            return []
        delivered = self.record["parcels"] if self.record else {}
        send = partial(RunSender.send_status, status=self.status, end=self._state.get("time"))
        status = Parcel("status", f"{self.status} {self._state.get('time', '')}", send)
        rest = list(list_parcels(self.place, self.tags, delivered, self.child, self.largest_model))
        parcels = [status, *rest] if self.status == "RUNNING" else [*rest, status]
        return [parcel for parcel in parcels if delivered.get(parcel.name) != parcel.version]

    @property
    def record(self) -> DeliveryRecord | None:
        """The record of this server; None if nothing arrived yet."""
        return self._state.get("servers", {}).get(hide_password(self.uri))

    @property
    def _has_content(self) -> bool:
        """True if the run is for MLflow: if a command failed before it made anything, nothing is sent."""
        return bool(self.child or self.status == "FINISHED" or self.place.has_training)

    @property
    def status(self) -> str:
        return self._state.get("status", "RUNNING")

    @property
    def last_status(self) -> str:
        """The status with which the last driver ended; if it was killed, the status follows from the files."""
        if self.status != "RUNNING":
            return self.status
        finished = self.place.locate_step(self.place.experiment.train.steps).exists()
        return "FINISHED" if finished else "KILLED"


def deliver_run(uri: str, study: str, place: Place, largest_model: float = 0) -> str:
    """Send the whole run directory again, and return a summary. The caller holds the run's lock.

    Raises PipelineError if the server does not answer.
    """
    mirror = Mirror(uri, study, place, largest_model=largest_model)
    mirror._state.get("servers", {}).pop(hide_password(uri), None)
    mirror._state["status"] = mirror.last_status
    what = f"{place.path} could not be delivered to {hide_password(uri)}"
    with mlflow_client.translate_errors(uri, what, "try again later"):
        mirror.deliver()
    return f"{describe_delivery(place, uri, largest_model)}: delivered {_count_kinds(mirror.sent)}"


def register_run(uri: str, place: Place, step: int, name: str, alias: str | None) -> str:
    """Register the weights of a step under a name, with an alias, and return the model's address."""
    mirror = Mirror(uri, place.experiment.name, place)
    mirror._state["status"] = mirror.last_status
    with mlflow_client.translate_errors(uri, f"{place.path} could not be registered", "try again later"):
        mirror.deliver()
        assert mirror.sender, "a run with a checkpoint has content"
        return models.register_model(uri, mirror.sender.send_weights(step), name, alias)


def _count_kinds(parcels: Iterable[str]) -> str:
    kinds = Counter(name.split()[0] for name in parcels)
    return ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())


def describe_delivery(place: Place, uri: str | None, largest_model: float = 0) -> str:
    """Return where the run is in MLflow, and whether it is complete there. Reads files only."""
    uri = uri or mlflow_client.find_default_uri(place.storage)
    mirror = Mirror(uri, place.experiment.name, place, largest_model=largest_model)
    again = _format_sync_command(place, uri)
    if (record := mirror.record) is None:
        return f"nothing in {hide_password(uri)} yet ({again})"
    study = mlflow_client.format_study_url(uri, record["experiment_id"])
    where = f"{study}{mlflow_client.TABLE}{mlflow_client.explain_ui(uri, place.storage)}"
    mirror._state["status"] = mirror.last_status
    if not (missing := mirror.list_missing()):
        return where
    return f"{where}, not up to date: {_count_kinds(parcel.name for parcel in missing)} missing ({again})"


def list_links(place: Place) -> list[tuple[str, str]]:
    """List the addresses of the run in MLflow, each with the command that serves it. Reads files only."""
    links = []
    for uri, of in read_record(place.tracking_json, MirrorState).get("servers", {}).items():
        run = f"{mlflow_client.format_study_url(uri, of['experiment_id'])}/{of['run_id']}{mlflow_client.VIEW}"
        links.append((run, mlflow_client.explain_ui(uri, place.storage)))
    return links


def _format_sync_command(place: Place, uri: str) -> str:
    """Return the command that delivers the run to that server, as it can be typed in any folder."""
    words = ["ddpm", "sync", str(place.path)]
    if uri != mlflow_client.find_default_uri(place.storage):
        words.append(f"cluster.tracking_uri={hide_password(uri)}")
    return f"`{shlex.join(words)}`"
