"""Connections to a tracking server, or to the embedded store of a storage root."""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from pipeline.errors import PipelineError, explain_network_error, hide_password
from pipeline.store.files import atomic_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

Point = tuple[str, float, int, int]  # name, value, Unix milliseconds, step

ARTIFACTS = "mlartifacts"
COLUMNS = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
BATCH = 1000  # metrics that MLflow takes in one call
# What makes the UI show studies as training runs instead of language models' evaluations: a tag, or in newer
# versions the link.
KIND = {"mlflow.experimentKind": "custom_model_development"}
VIEW = "?workflowType=machine_learning"

# The mirror tries again by itself, and a look-up precedes everything that must not be made twice.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def default_uri(storage: Path) -> str:
    """Return the embedded store of a storage root."""
    return f"sqlite:///{storage.resolve()}/mlflow.db"


def connect(uri: str) -> MlflowClient:
    """Make a client. Importing MLflow takes seconds, so it happens here, on whichever thread needs it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        store = Path(uri.removeprefix("sqlite:///"))
        if not store.exists():
            # MLflow makes its tables one by one, and a store in which a killed process made some is lost for good.
            with atomic_file(store) as temporary:
                MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
        follow_move(store)
    return MlflowClient(uri)


def locate_runs(uri: str, storage: Path, experiment_id: str) -> str:
    """Return where the UI shows the runs of a study; before it, of an embedded store, the command that serves it."""
    base = hide_password(uri).rstrip("/")
    if not uri.startswith("http"):
        command = shlex.join(["ddpm", "ui", f"cluster.storage={storage}"])
        base = f"`{command}`, then http://127.0.0.1:5000"
    return f"{base}/#/experiments/{experiment_id}/runs"


def check(uri: str) -> None:
    """Raise PipelineError unless the tracking server answers an API call."""
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow, SQLAlchemy, requests and urllib3 share no narrower base
        place = hide_password(uri)
        raise PipelineError(
            f"the tracking server {place} does not answer ({explain_network_error(error)}); start it, or leave out "
            f"cluster.tracking_uri and deliver later with `ddpm sync RUN cluster.tracking_uri={place}`"
        ) from error


def find_study(client: MlflowClient, uri: str, storage: Path, study: str) -> str:
    """Return the id of MLflow's experiment of that name, made if there is none."""
    found = client.get_experiment_by_name(study)
    if found is None:
        place = (storage / ARTIFACTS / study).resolve().as_uri()
        made: str = client.create_experiment(study, None if uri.startswith("http") else place, KIND)
        return made
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def find_run(
    client: MlflowClient, experiment_id: str, name: str, identity: dict[str, str], start: int, **tags: str
) -> str:
    """Return the id of the run that carries the tags `identity`, made if there is none; start: Unix milliseconds."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_runs([experiment_id], query, max_results=1)
    run = found[0] if found else client.create_run(experiment_id, start, identity | tags, name)
    return str(run.info.run_id)


def log(
    client: MlflowClient,
    run_id: str,
    points: Iterable[Point] = (),
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
    model_id: str | None = None,
) -> None:
    """Log points, tags and parameters in as few calls as MLflow allows."""
    from mlflow.entities import Metric, Param, RunTag

    metrics = [Metric(*point, model_id=model_id) for point in points]
    labels = [RunTag(*tag) for tag in (tags or {}).items()]
    parameters = [Param(*param) for param in (params or {}).items()]
    for first in range(0, max(len(metrics), 1), BATCH):
        client.log_batch(run_id, metrics[first : first + BATCH], parameters, labels)


class Sender:
    """Sends to a server that may be away: the first refusal is warned of, none is raised, and the work goes on."""

    def __init__(self, uri: str, warn: Callable[[str], None]):
        self.uri, self.warn, self.warned = uri, warn, False

    def attempt(self, send: Callable[[], None], what: str = "") -> bool:
        """Send, and tell whether the server took it."""
        try:
            send()
        except Exception as error:  # whatever a server or its client comes up with
            if not self.warned:
                self.warn(
                    f"the tracking server {hide_password(self.uri)} takes nothing{what} "
                    f"({explain_network_error(error)}); the work goes on, and what is missing there is delivered "
                    "when it is back"
                )
            self.warned = True
            logger.debug("tracking", exc_info=True)
            return False
        return True


def follow_move(store: Path) -> None:
    """Correct the absolute paths that a store, a sqlite file, has of its artifacts, where its storage root was moved.

    That is so where they are gone from their place and lie beside the store. Anything else is left as it is.
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
