"""MLflow clients for a tracking server or the embedded store of a storage root."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pipeline.errors import PipelineError, explain_network_error, hide_password
from pipeline.store.files import lock_folder, name_user, require_regular_file, write_atomically

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.store.entities import PagedList

    from pipeline.config import ClusterConfig

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
MetricPoint = tuple[str, float, int, int]  # name, value, Unix milliseconds, step

ARTIFACTS = "mlartifacts"
COLUMNS = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
BATCH = 1000  # metrics that MLflow takes in one call
# The UI shows a study as training runs, not as evaluations of language models, because of this tag, or in newer
# versions because of the link.
KIND = {"mlflow.experimentKind": "custom_model_development"}
VIEW = "?workflowType=machine_learning"
# What the table shows that a link with TABLE opens: MLflow keeps it as a tag of the experiment.
TABLE = f"{VIEW}&viewStateShareKey=scores"
TABLE_TAG = "mlflow.sharedViewState.scores"
# The same of a study: its trials alone, the best first.
TRIALS, TRIALS_TAG = f"{VIEW}&viewStateShareKey=trials", "mlflow.sharedViewState.trials"
SCORES = [f"metrics.`{name}`" for name in ("fid", "is_mean", "nll_bpd", "loss/train")]

PATIENCE = 5  # seconds for a database to answer
# Errors that may pass by themselves; all others of a server or its driver count as lasting.
PASSING = "refused|time(d |)out|temporary|no route|is locked|starting up|too many|code (429|5..)|reset by|closed the"

# No retries: the mirror tries again by itself.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "PGCONNECT_TIMEOUT": str(PATIENCE),
    "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}  # fmt: skip


@contextmanager
def use_server(uri: str) -> Iterator[None]:
    """Let those functions of MLflow that take no address ask `uri`; afterwards they ask what they asked before."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")  # set_tracking_uri sets it too
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # as MLflow itself does
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def find_default_uri(storage: Path) -> str:
    return format_sqlite_uri(storage.resolve() / "mlflow.db")


def find_uri(cluster: ClusterConfig) -> str:
    """Return the URI of a cluster's tracking store: its own, or the embedded one of its storage root."""
    return cluster.tracking_uri or find_default_uri(cluster.storage_root)


def format_sqlite_uri(store: Path) -> str:
    if set("%?").isdisjoint(str(store)):
        return f"sqlite:///{store}"
    # Of a URI that does not name the driver, MLflow would make the quoted folders.
    return f"sqlite+pysqlite:///{quote(str(store))}"


def find_sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store; None for any other store or server."""
    scheme, _, path = uri.partition(":///")
    return Path(unquote(path.partition("?")[0])) if scheme.startswith("sqlite") else None


def create_client(uri: str) -> MlflowClient:
    """Create a client for the server or store at `uri`. MLflow is imported here, because that takes seconds."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow", "sqlalchemy"):  # after the import, which sets levels: our words say it
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    if store := find_sqlite_file(uri):
        if not require_regular_file(store).exists():
            with lock_folder(store.parent, wait=True):  # two commands may be the first ones
                if not store.exists():
                    # MLflow makes its tables one by one; a store that a killed process left half made is lost.
                    with write_atomically(store) as temporary:
                        _check_database(made := format_sqlite_uri(temporary))
                        MlflowClient(made).search_experiments(max_results=1)
        correct_artifact_paths(store)
    if not uri.startswith(("http", "databricks")):
        _check_database(uri)
    return MlflowClient(uri)


def _check_database(uri: str) -> None:
    """Read from a database, so that its driver's error is raised at once: MLflow would retry for two minutes."""
    import sqlalchemy

    timeout = "timeout" if uri.startswith(("sqlite", "mssql")) else "connect_timeout"
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, connect_args={timeout: PATIENCE})
    sqlalchemy.inspect(engine).get_table_names()


def explain_store_error(error: Exception, uri: str) -> tuple[str, str]:
    """Return why a store takes nothing, and the remedy; none if it may pass by itself."""
    reason = re.sub(r"^\(\S+\) ", "", explain_network_error(error, uri))
    if found := re.search(r"schema \(found version (\w+)", reason):
        import mlflow

        if any(Path(mlflow.__path__[0]).glob(f"store/db_migrations/versions/{found[1]}_*.py")):
            upgrade = shlex.join(["mlflow", "db", "upgrade", hide_password(uri)])
            return "an older MLflow made its tables", f"copy the database, then run `{upgrade}`"
        return f"its tables are not of MLflow {mlflow.__version__}", "install the newer one that made them"
    if re.search(r"\b401\b", reason):
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        return "401: it needs a user and a password that it knows", remedy
    # MLflow, SQLAlchemy, its drivers, requests and urllib3 share no narrower base.
    if isinstance(error, ConnectionError | TimeoutError) or re.search(PASSING, f"{error} {reason}".lower()):
        return reason, ""
    if isinstance(error, ImportError):
        return reason, "install this module"
    return reason, "check its address, and that it can be read and written"


def format_study_url(uri: str, experiment_id: str) -> str:
    """Return the UI's address of a study's runs; for a store without a server, where `ddpm ui` serves it."""
    base = hide_password(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{base}/#/experiments/{experiment_id}/runs"


def explain_ui(uri: str, storage: Path) -> str:
    """Return which command serves the links into a store; '' if a server does already."""
    words = shlex.join(["ddpm", "ui", f"cluster.storage={storage}"])
    return "" if uri.startswith("http") else f" (served by `{words}`)"


def check_server(uri: str) -> None:
    """Raise PipelineError unless the tracking server answers an API call."""
    place = hide_password(uri)
    later = f"deliver later with `ddpm sync RUN cluster.tracking_uri={place}`"
    what = f"the tracking server {place} does not answer"
    with translate_errors(
        uri, what, "start it or wait for it", f", or leave out cluster.tracking_uri and {later}"
    ):
        create_client(uri).search_experiments(max_results=1)


@contextmanager
def translate_errors(uri: str, what: str, remedy: str, rest: str = "") -> Iterator[None]:
    """Raise what a server or its client does to the body as a PipelineError; remedy: if it may pass by itself."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # of any type
        reason, found = explain_store_error(error, uri)
        raise PipelineError(f"{what} ({reason}); {found or remedy}{rest}") from error


def ensure_experiment(client: MlflowClient, uri: str, storage: Path, study: str) -> str:
    """Return the id of MLflow's experiment of that name; create it if there is none."""
    found = client.get_experiment_by_name(study)
    if found is None:
        place = None if uri.startswith("http") else (storage / ARTIFACTS / study).resolve().as_uri()
        found = client.get_experiment(client.create_experiment(study, place, KIND))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    if found.tags.get(TABLE_TAG) != (columns := json.dumps({"selectedColumns": SCORES})):
        client.set_experiment_tag(found.experiment_id, TABLE_TAG, columns)
    return str(found.experiment_id)


def ensure_run(
    client: MlflowClient, experiment_id: str, name: str, identity: dict[str, str], start: int, **tags: str
) -> str:
    """Return the id of the MLflow run tagged `identity`; create it if there is none. start: Unix milliseconds."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_runs([experiment_id], query, max_results=1)
    source = {"mlflow.source.name": "ddpm", "mlflow.source.type": "LOCAL"}
    tags |= {**identity, "mlflow.user": name_user(), **source}
    run = found[0] if found else client.create_run(experiment_id, start, tags, name)
    return str(run.info.run_id)


def read_pages(search: Callable[..., PagedList[Item]]) -> Iterator[Item]:
    """Yield all that a search of MLflow finds, which it gives page by page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return


def log_batches(
    client: MlflowClient, run_id: str, points: Iterable[MetricPoint],
    tags: Mapping[str, str] = MappingProxyType({}), model_id: str | None = None,
) -> None:  # fmt: skip
    """Log points and tags of an MLflow run in few calls; if `model_id` is given, log the points there too."""
    from mlflow.entities import Metric, RunTag

    metrics = [Metric(*point, model_id=model_id) for point in points]
    labels = [RunTag(*tag) for tag in tags.items()]
    for first in range(0, max(len(metrics), 1), BATCH):
        client.log_batch(run_id, metrics[first : first + BATCH], tags=labels)


class Sender:
    """Base class that sends to a server; it warns of the first error and raises none."""

    def __init__(self, uri: str, warn: Callable[[str], None]):
        self.uri, self.warn, self.warned, self.is_behind = uri, warn, False, False

    @contextmanager
    def warn_of_errors(self, what: str = "") -> Iterator[None]:
        """Raise no error of the body; after one, `is_behind` is true."""
        try:
            yield
        except Exception as error:  # a server or its client may raise anything
            logger.debug("tracking", exc_info=True)
            self.is_behind = True
            if not self.warned:
                self.warned = True
                reason, remedy = explain_store_error(error, self.uri)
                self.warn(
                    f"the tracking server {hide_password(self.uri)} takes nothing{what} ({reason}); the work "
                    "continues, and what is missing there is delivered "
                    + (f"once that is repaired: {remedy}" if remedy else "when it is back")
                )


def correct_artifact_paths(store: Path) -> None:
    """Correct the absolute paths of artifacts in a store, a sqlite file, after its storage root was moved.

    It was moved if the artifacts are not in their old place but beside the store.
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
