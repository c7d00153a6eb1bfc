"""A study on the tracking server: its parent run, which holds the leaderboard, and the state of its trials."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from pipeline.config.checks import Tree
from pipeline.errors import hide_password
from pipeline.tracking import mlflow_client
from pipeline.tracking.mlflow_client import SCORES, TRIALS_TAG, VIEW, Sender, log_batches, read_pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TABLE = "leaderboard.json"
PARENT_TAG, TRIAL_TAG, STATE_TAG = "mlflow.parentRunId", "sweep.trial", "sweep.state"
REMOVED_TAG = "sweep.removed"

Rung = tuple[int, float, int]  # step, bound in bits/dim, Unix milliseconds


class ParentRun(Sender):
    """The parent run of a study. Its methods never raise: the same command later sends what is missing."""

    client: MlflowClient
    experiment_id = run_id = ""

    def __init__(
        self, uri: str, study: str, storage: Path, warn: Callable[[str], None], metric: str, larger_is_better: bool
    ):  # fmt: skip
        super().__init__(uri, warn)
        self.study, self.storage = study, storage
        # What the UI shows of the study: its trials, the best first.
        self.view = {
            "searchFilter": f"tags.`{TRIAL_TAG}` != ''",
            "orderByKey": f"metrics.`{metric}`", "orderByAsc": not larger_is_better,
        }  # fmt: skip
        self.children: dict[str, str] = {}  # runs of trials, by their keys
        self.sent_rungs: dict[str, int] = {}  # how many of each trial

    def connect(self) -> None:
        """Find or create the parent run, once."""
        if not self.run_id:
            self.client = mlflow_client.create_client(self.uri)
            study, storage, now = self.study, self.storage, time.time_ns() // 1_000_000
            self.experiment_id = mlflow_client.ensure_experiment(self.client, self.uri, storage, study)
            table = json.dumps({"selectedColumns": SCORES, **self.view})
            self.client.set_experiment_tag(self.experiment_id, TRIALS_TAG, table)
            ids, identity = (self.client, self.experiment_id), {"sweep": study, "sweep.role": "parent"}
            self.run_id = mlflow_client.ensure_run(*ids, f"sweep {study}", identity, now)

    def start(self, sweep_file: Path, trials: Collection[str]) -> None:
        """Set the parent to RUNNING. Mark the children of points that are no longer in the sweep."""
        with self.warn_of_errors(" of the sweep"):
            self.connect()
            self.client.update_run(self.run_id, status="RUNNING")
            self.client.log_artifact(self.run_id, str(sweep_file))
            for child in self._search_children():
                run_id, tags = child.info.run_id, child.data.tags
                if tags.get(TRIAL_TAG) in trials:
                    self.children[tags[TRIAL_TAG]] = run_id
                    if REMOVED_TAG in tags:
                        self.client.delete_tag(run_id, REMOVED_TAG)
                    continue
                self.client.set_tag(run_id, REMOVED_TAG, "the sweep file does not have this point any more")
                if child.info.status == "RUNNING":
                    self.client.set_tag(run_id, STATE_TAG, "interrupted")
                    self.client.set_terminated(run_id, "KILLED")

    def send_leaderboard(
        self, table: Sequence[Tree], markdown: str, tags: dict[str, str],
        scores: dict[str, float], rungs: Mapping[str, Sequence[Rung]],
    ) -> None:  # fmt: skip
        # MLflow's own `log_table` would append to the rows that are there.
        content = {"columns": list(table[0]), "data": [list(row.values()) for row in table]}
        tags = {**tags, "mlflow.note.content": markdown}
        tags["mlflow.loggedArtifacts"] = json.dumps([{"path": TABLE, "type": "table"}])
        with self.warn_of_errors(" of the sweep"):
            self.connect()
            self.client.log_text(self.run_id, json.dumps(content), TABLE)
            known, now = self.client.get_run(self.run_id).data.metrics, time.time_ns() // 1_000_000
            points = [(key, value, now, 0) for key, value in scores.items() if known.get(key) != value]
            log_batches(self.client, self.run_id, points, tags)
            for trial, own in rungs.items():
                new = own[self.sent_rungs.get(trial, 0) :]
                if new and (child := self._find_child(trial)):
                    points = [("rung/nll_bpd", value, when, step) for step, value, when in new]
                    log_batches(self.client, child, points)
                    self.sent_rungs[trial] = len(own)

    def finish(self, status: str, report: Path) -> None:
        with self.warn_of_errors(" of the sweep"):
            self.connect()
            if report.is_dir():
                self.client.log_artifacts(self.run_id, str(report), "report")
            self.client.set_terminated(self.run_id, status)

    def list_links(self) -> list[tuple[str, str]]:
        """Return (name, address) in the UI: of the study with its leaderboard, and of its trials."""
        if not self.run_id:
            return [("MLflow", f"nothing in {hide_password(self.uri)} yet; the same command delivers it")]
        runs = mlflow_client.format_study_url(self.uri, self.experiment_id)
        query = {"compareRunsMode": "CHART", **self.view, "orderByAsc": json.dumps(self.view["orderByAsc"])}
        served = mlflow_client.explain_ui(self.uri, self.storage)
        rest = ", not up to date: the same command delivers the rest" if self.is_behind else ""
        return [
            ("MLflow", f"{runs}/{self.run_id}{VIEW}{served}{rest}"),
            ("its trials", f"{runs}{VIEW}&{urlencode(query, quote_via=quote)}"),
        ]

    def _search_children(self, query: str = "") -> Iterator[Run]:
        query = f"tags.`{PARENT_TAG}` = '{self.run_id}'{query}"
        return read_pages(partial(self.client.search_runs, [self.experiment_id], query))

    def _find_child(self, trial: str) -> str | None:
        """Return the id of a trial's run, if the server has one by now."""
        if trial not in self.children:
            for found in self._search_children(f" and tags.`{TRIAL_TAG}` = '{trial}'"):
                self.children[trial] = found.info.run_id
        return self.children.get(trial)
