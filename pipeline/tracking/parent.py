"""A sweep on the tracking server: the parent run, and the state of its children after every kind of end."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec
from urllib.parse import quote, urlencode

from pipeline.errors import hide_password
from pipeline.tracking.client import VIEW, Sender, connect, find_run, find_study, log

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

P = ParamSpec("P")

logger = logging.getLogger(__name__)

TABLE = "leaderboard.json"
PARENT, TRIAL, STATE, REMOVED = "mlflow.parentRunId", "sweep.trial", "sweep.state", "sweep.removed"

Cell = bool | int | float | str | None | list["Cell"]
Rung = tuple[int, float, int]  # step, bound in bits/dim, Unix milliseconds


@dataclass(frozen=True)
class Standing:
    """The present state of a sweep. table: the leaderboard, a mapping for each row; note: the same for people, in
    Markdown; best: (tags, metrics) of the first row; rungs: by trial."""

    table: Sequence[Mapping[str, Cell]]
    note: str
    best: tuple[dict[str, str], dict[str, float]]
    rungs: Mapping[str, Sequence[Rung]]


def _attempted(send: Callable[Concatenate[Parent, P], None]) -> Callable[Concatenate[Parent, P], None]:
    """Make a method of the parent connect first, and warn where the server takes nothing."""

    @wraps(send)
    def attempt(parent: Parent, *args: P.args, **kwargs: P.kwargs) -> None:
        def connect_and_send() -> None:
            if not parent.run_id:
                parent.connect()
            send(parent, *args, **kwargs)

        parent.attempt(connect_and_send, " of the sweep")

    return attempt


class Parent(Sender):
    """The parent run of a study. It never raises: the same command delivers later what a server did not take."""

    client: MlflowClient
    experiment_id = run_id = ""

    def __init__(self, uri: str, study: str, storage: Path, warn: Callable[[str], None] = logger.warning):
        super().__init__(uri, warn)
        self.study, self.storage = study, storage

    def connect(self) -> None:
        """Find or make the parent."""
        self.client = connect(self.uri)
        self.experiment_id = find_study(self.client, self.uri, self.storage, self.study)
        identity, now = {"sweep": self.study, "sweep.role": "parent"}, time.time_ns() // 1_000_000
        self.run_id = find_run(self.client, self.experiment_id, f"sweep {self.study}", identity, now)

    @_attempted
    def start(self, sweep_file: Path) -> None:
        """Let the parent run from now on."""
        self.client.update_run(self.run_id, status="RUNNING")
        self.client.log_artifact(self.run_id, str(sweep_file))

    @_attempted
    def reconcile(self, trials: set[str]) -> None:
        """Mark children of points that the sweep has no more; they are not deleted, and run no longer."""
        for child in self._list_children():
            run_id, tags = child.info.run_id, child.data.tags
            if tags.get(TRIAL) in trials:
                if REMOVED in tags:
                    self.client.delete_tag(run_id, REMOVED)
                continue
            self.client.set_tag(run_id, REMOVED, "the sweep file does not have this point any more")
            if child.info.status == "RUNNING":
                self.client.set_tag(run_id, STATE, "interrupted")
                self.client.set_terminated(run_id, "KILLED")

    @_attempted
    def publish(self, standing: Standing) -> None:
        """Send the leaderboard as it is now."""
        if standing.table:
            self._send_table(standing.table)
        tags, values = standing.best
        known, now = self.client.get_run(self.run_id).data.metrics, time.time_ns() // 1_000_000
        points = [(key, value, now, 0) for key, value in values.items() if known.get(key) != value]
        log(self.client, self.run_id, points, tags | {"mlflow.note.content": standing.note})
        for child in self._list_children() if any(standing.rungs.values()) else ():
            rungs = standing.rungs.get(child.data.tags.get(TRIAL, ""), ())
            if rungs:
                points = [("rung/nll_bpd", value, when, step) for step, value, when in rungs]
                log(self.client, child.info.run_id, points)

    @_attempted
    def finish(self, status: str, report: Path) -> None:
        """Send the report as artifact, and the last word."""
        if report.is_dir():
            self.client.log_artifacts(self.run_id, str(report), "report")
        self.client.set_terminated(self.run_id, status)

    def links(self, metric: str, larger_is_better: bool) -> list[tuple[str, str]]:
        """Return (what, where) in the UI: the study with its leaderboard, and its trials with their charts, best
        first."""
        address = hide_password(self.uri)
        if not self.run_id:
            return [("MLflow", f"nothing in {address} yet; the same command delivers it")]
        base, hint = address.rstrip("/"), ""
        if not self.uri.startswith("http"):
            ui = shlex.join(["ddpm", "ui", f"cluster.storage={self.storage}"])
            base, hint = "http://127.0.0.1:5000", f"`{ui}`, then "
        runs = f"{base}/#/experiments/{self.experiment_id}/runs"
        query = {
            "compareRunsMode": "CHART",
            "searchFilter": f"tags.`{TRIAL}` != ''",
            "orderByKey": f"metrics.`{metric}`",
            "orderByAsc": str(not larger_is_better).lower(),
        }
        return [
            ("MLflow", f"{hint}{runs}/{self.run_id}{VIEW}"),
            ("its trials", f"{runs}{VIEW}&{urlencode(query, quote_via=quote)}"),
        ]

    def _list_children(self) -> Iterator[Run]:
        query, token = f"tags.`{PARENT}` = '{self.run_id}'", None
        while True:
            page = self.client.search_runs([self.experiment_id], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _send_table(self, rows: Sequence[Mapping[str, Cell]]) -> None:
        """Replace the table: `log_table` appends to one that is there, so only the first one is its."""
        columns = {key: [row.get(key) for row in rows] for key in rows[0]}
        if TABLE not in self.client.get_run(self.run_id).data.tags.get("mlflow.loggedArtifacts", ""):
            self.client.log_table(self.run_id, columns, TABLE)
            return
        split = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        self.client.log_text(self.run_id, json.dumps(split), TABLE)
