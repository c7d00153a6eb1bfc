"""A sweep on the tracking server: the parent run, and the state of its children after every kind of end."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from pipeline.tracking.session import VIEW, client_of, find_run, find_study, reason, shown

logger = logging.getLogger(__name__)

TABLE = "leaderboard.json"
PARENT, TRIAL, STATE, REMOVED = "mlflow.parentRunId", "sweep.trial", "sweep.state", "sweep.removed"


@dataclass(frozen=True)
class Standing:
    """How a sweep stands: table: the leaderboard, a mapping for each row; note: the same for people, in
    Markdown; best: (tags, metrics) of the first row; rungs: trial -> (step, bound, Unix milliseconds)."""

    table: list[dict[str, Any]]
    note: str
    best: tuple[dict[str, str], dict[str, float]]
    rungs: dict[str, list[tuple[int, float, int]]]


class Parent:
    """The parent run of a study. It never raises: a server that takes nothing is warned of once, and the same
    command delivers later what is missing."""

    def __init__(self, uri: str, study: str, storage: Path, warn: Callable[[str], None] = logger.warning):
        self.uri, self.study, self.storage, self.warn = uri, study, storage, warn
        self.client: Any = None
        self.experiment_id = self.run_id = ""
        self.warned = False

    def start(self, sweep_file: Path) -> None:
        """Find or make the parent, which runs from now on."""

        def send() -> None:
            self.client.update_run(self.run_id, status="RUNNING")
            self.client.log_artifact(self.run_id, str(sweep_file))

        self._attempt(send)

    def reconcile(self, trials: set[str]) -> None:
        """Children of points that the sweep has no more are marked, not deleted, and run no longer."""

        def send() -> None:
            for child in self._children():
                run_id, tags = child.info.run_id, child.data.tags
                if tags.get(TRIAL) in trials:
                    if REMOVED in tags:
                        self.client.delete_tag(run_id, REMOVED)
                    continue
                self.client.set_tag(run_id, REMOVED, "the sweep file does not have this point any more")
                if child.info.status == "RUNNING":
                    self.client.set_tag(run_id, STATE, "interrupted")
                    self.client.set_terminated(run_id, "KILLED")

        self._attempt(send)

    def publish(self, standing: Standing) -> None:
        """The leaderboard as it is now."""

        def send() -> None:
            from mlflow.entities import Metric, RunTag

            self._send_table(standing.table)
            tags, metrics = standing.best
            now = time.time_ns() // 1_000_000
            known = self.client.get_run(self.run_id).data.metrics
            self.client.log_batch(
                self.run_id,
                metrics=[
                    Metric(key, value, now, 0) for key, value in metrics.items() if known.get(key) != value
                ],
                tags=[RunTag(key, value) for key, value in tags.items()]
                + [RunTag("mlflow.note.content", standing.note)],
            )
            self._send_rungs(standing.rungs)

        self._attempt(send)

    def finish(self, status: str, report: Path) -> None:
        """The report as artifact, and the last word."""

        def send() -> None:
            if report.is_dir():
                self.client.log_artifacts(self.run_id, str(report), "report")
            self.client.set_terminated(self.run_id, status)

        self._attempt(send)

    def links(self, metric: str, larger_is_better: bool) -> list[tuple[str, str]]:
        """(what, where) in the UI: the study with its leaderboard, and its trials with their charts, best first."""
        if not self.run_id:
            return [("MLflow", f"nothing in {shown(self.uri)} yet; the same command delivers it")]
        served, ui = (
            self.uri.startswith("http"),
            shlex.join(["ddpm", "ui", f"cluster.storage={self.storage}"]),
        )
        base = shown(self.uri).rstrip("/") if served else "http://127.0.0.1:5000"
        runs = f"{base}/#/experiments/{self.experiment_id}/runs"
        query = {
            "compareRunsMode": "CHART",
            "searchFilter": f"tags.`{TRIAL}` != ''",
            "orderByKey": f"metrics.`{metric}`",
            "orderByAsc": str(not larger_is_better).lower(),
        }
        return [
            ("MLflow", f"{'' if served else f'`{ui}`, then '}{runs}/{self.run_id}{VIEW}"),
            ("its trials", f"{runs}{VIEW}&{urlencode(query, quote_via=quote)}"),
        ]

    def _attempt(self, send: Callable[[], None]) -> None:
        try:
            if self.client is None:
                self._connect()
            send()
        except Exception as error:  # whatever a server or its client comes up with, the work goes on
            self.client = None
            if not self.warned:
                self.warn(
                    f"the tracking server {shown(self.uri)} takes nothing of the sweep ({reason(error)})"
                )
            self.warned = True
            logger.debug("tracking", exc_info=True)

    def _connect(self) -> None:
        client = client_of(self.uri)
        self.experiment_id = find_study(client, self.uri, self.storage, self.study)
        identity, now = {"sweep": self.study, "sweep.role": "parent"}, time.time_ns() // 1_000_000
        self.run_id = find_run(client, self.experiment_id, f"sweep {self.study}", identity, now, {})
        self.client = client

    def _children(self) -> Iterator[Any]:
        query, token = f"tags.`{PARENT}` = '{self.run_id}'", None
        while True:
            page = self.client.search_runs([self.experiment_id], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _send_table(self, rows: list[dict[str, Any]]) -> None:
        """`log_table` appends to a table that is there, so only the first one is its."""
        if not rows:
            return
        columns = {key: [row.get(key) for row in rows] for key in rows[0]}
        there = self.client.get_run(self.run_id).data.tags.get("mlflow.loggedArtifacts", "")
        if TABLE not in there:
            self.client.log_table(self.run_id, columns, TABLE)
            return
        split = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        self.client.log_text(self.run_id, json.dumps(split), TABLE)

    def _send_rungs(self, rungs: dict[str, list[tuple[int, float, int]]]) -> None:
        from mlflow.entities import Metric

        judged = {trial: points for trial, points in rungs.items() if points}
        for child in self._children() if judged else ():
            points = judged.get(child.data.tags.get(TRIAL), [])
            metrics = [Metric("rung/nll_bpd", value, when, step) for step, value, when in points]
            if metrics:
                self.client.log_batch(child.info.run_id, metrics=metrics)
