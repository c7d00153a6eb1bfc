"""Clients of a tracking server or of the embedded store of a storage root, and what they need."""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from pipeline.errors import PipelineError, explain_network_error, hide_password
from pipeline.store.files import write_atomically

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

MetricPoint = tuple[str, float, int, int]  # name, value, Unix milliseconds, step

ARTIFACTS = "mlartifacts"
COLUMNS = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
BATCH = 1000  # metrics that MLflow takes in one call
# The UI shows a study as training runs, not as evaluations of language models, because of this tag, or in newer
# versions because of the link.
KIND = {"mlflow.experimentKind": "custom_model_development"}
VIEW = "?workflowType=machine_learning"

# No retries: the mirror tries again by itself.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}  # fmt: skip


def find_default_uri(storage: Path) -> str:
    """Return the URI of the embedded store of a storage root."""
    return f"sqlite:///{storage.resolve()}/mlflow.db"


def create_client(uri: str) -> MlflowClient:
    """Create a client for the server or store at `uri`. MLflow is imported here, because that takes seconds."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        store = Path(uri.removeprefix("sqlite:///"))
        if not store.exists():
            # MLflow makes its tables one by one; a store that a killed process left half made cannot be repaired.
            with write_atomically(store) as temporary:
                MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
        correct_artifact_paths(store)
    return MlflowClient(uri)


def format_study_url(uri: str, storage: Path, experiment_id: str) -> str:
    """Return the UI's address of a study's runs; for an embedded store, the command that starts the UI first."""
    base = hide_password(uri).rstrip("/")
    if not uri.startswith("http"):
        base = f"`{shlex.join(['ddpm', 'ui', f'cluster.storage={storage}'])}`, then http://127.0.0.1:5000"
    return f"{base}/#/experiments/{experiment_id}/runs"


def check_server(uri: str) -> None:
    """Raise PipelineError unless the tracking server answers an API call."""
    try:
        create_client(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow, SQLAlchemy, requests and urllib3 share no narrower base
        place = hide_password(uri)
        raise PipelineError(
            f"the tracking server {place} does not answer ({explain_network_error(error)}); start it, or leave out "
            f"cluster.tracking_uri and deliver later with `ddpm sync RUN cluster.tracking_uri={place}`"
        ) from error


def ensure_experiment(client: MlflowClient, uri: str, storage: Path, study: str) -> str:
    """Return the id of MLflow's experiment of that name; create it where there is none."""
    found = client.get_experiment_by_name(study)
    if found is None:
        place = None if uri.startswith("http") else (storage / ARTIFACTS / study).resolve().as_uri()
        return str(client.create_experiment(study, place, KIND))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def ensure_run(
    client: MlflowClient, experiment_id: str, name: str, identity: dict[str, str], start: int, **tags: str
) -> str:
    """Return the id of the run with the tags `identity`; create it where there is none. start: Unix milliseconds."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_runs([experiment_id], query, max_results=1)
    run = found[0] if found else client.create_run(experiment_id, start, identity | tags, name)
    return str(run.info.run_id)


def log_batches(
    client: MlflowClient,
    run_id: str,
    points: Iterable[MetricPoint],
    tags: Mapping[str, str] = MappingProxyType({}),
    model_id: str | None = None,
) -> None:
    """Log points and tags of a run in as few calls as MLflow allows; the points at a model too, where one is named."""
    from mlflow.entities import Metric, RunTag

    metrics = [Metric(*point, model_id=model_id) for point in points]
    labels = [RunTag(*tag) for tag in tags.items()]
    for first in range(0, max(len(metrics), 1), BATCH):
        client.log_batch(run_id, metrics[first : first + BATCH], tags=labels)


class Sender:
    """Base of what sends to a server that may be away: it warns of the first error and raises none."""

    def __init__(self, uri: str, warn: Callable[[str], None]):
        self.uri, self.warn, self.warned = uri, warn, False

    def try_send(self, send: Callable[[], None], what: str = "") -> bool:
        """Call `send`, and tell whether the server took it."""
        try:
            send()
            return True
        except Exception as error:  # whatever a server or its client comes up with
            logger.debug("tracking", exc_info=True)
            if not self.warned:
                self.warned = True
                self.warn(
                    f"the tracking server {hide_password(self.uri)} takes nothing{what} "
                    f"({explain_network_error(error)}); the work goes on, and what is missing there is delivered "
                    "when it is back"
                )
            return False


def correct_artifact_paths(store: Path) -> None:
    """Correct the absolute paths of artifacts in a store, a sqlite file, after its storage root was moved.

    It was moved where the artifacts are gone from their old place and lie beside the store.
    """
    here = (store.parent / ARTIFACTS).resolve()
    if not (store.exists() and here.is_dir()):
        return
    with closing(sqlite3.connect(store)) as db, db:
        query = "select artifact_location from experiments where artifact_location like ?"
        places = [place for (place,) in db.execute(query, (f"file://%/{ARTIFACTS}/%",))]
        for root in {place.rpartition(f"/{ARTIFACTS}/")[0] for place in places}:
            old, new = f"{root}/{ARTIFACTS}/", f"{here.as_uri()}/"
            if not Path(unquote(urlsplit(old).path)).exists():
                for table, column in COLUMNS.items():
                    db.execute(f"update {table} set {column} = replace({column}, ?, ?)", (old, new))
