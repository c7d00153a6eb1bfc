"""One connection to a tracking server, standing at one run. The only importer of mlflow."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.store import files as rundir
from pipeline.store.run import Place
from pipeline.tracking.moved import ARTIFACTS, follow_move

BATCH = 1000  # metrics that MLflow takes in one call
# What makes the UI show studies as training runs instead of language models' evaluations: a tag, or in newer
# versions the link.
KIND = {"mlflow.experimentKind": "custom_model_development"}
VIEW = "?workflowType=machine_learning"
TWIN = "+compressed.webp"  # how `log_image` names the small copy that it uploads after the picture

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
    """The embedded store of a storage root."""
    return f"sqlite:///{storage.resolve()}/mlflow.db"


def find_study(client: Any, uri: str, storage: Path, study: str) -> str:
    """The id of MLflow's experiment of that name, made if there is none."""
    found = client.get_experiment_by_name(study)
    if found is None:
        place = (storage / ARTIFACTS / study).resolve().as_uri()
        return client.create_experiment(study, None if uri.startswith("http") else place, KIND)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def find_run(
    client: Any, experiment_id: str, name: str, identity: dict[str, str], start: int, tags: dict[str, str]
) -> str:
    """The id of the run that carries the tags `identity`, made if there is none."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_runs([experiment_id], query, max_results=1)
    return (
        found[0].info.run_id
        if found
        else client.create_run(experiment_id, start, identity | tags, name).info.run_id
    )


def check(uri: str) -> None:
    """Raise PipelineError unless the tracking server answers an API call."""
    try:
        client_of(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow, SQLAlchemy, requests and urllib3 share no narrower base
        raise PipelineError(
            f"the tracking server {shown(uri)} does not answer ({reason(error)}); start it, or leave out "
            f"cluster.tracking_uri and deliver later with `ddpm sync RUN cluster.tracking_uri={shown(uri)}`"
        ) from error


def client_of(uri: str) -> Any:
    """Importing MLflow takes seconds, so it happens here, on whichever thread needs it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        store = Path(uri.removeprefix("sqlite:///"))
        _make_store(store)
        follow_move(store)
    return MlflowClient(tracking_uri=uri)


def _make_store(path: Path) -> None:
    """MLflow makes its tables one by one, and a store in which a killed process made some is lost for good:
    they are made under another name."""
    if path.exists():
        return
    from mlflow import MlflowClient

    with rundir.atomic_file(path) as temporary:
        MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments(max_results=1)


def shown(uri: str) -> str:
    """The URI without user and password."""
    parts = urlsplit(uri)
    return uri.replace(f"{parts.netloc.rpartition('@')[0]}@", "") if "@" in parts.netloc else uri


def reason(error: Exception) -> str:
    text = str(error)
    for sign in ("Connection refused", "timed out", "Name or service not known", "No route to host"):
        if sign.lower() in text.lower():
            return sign.lower()
    return (text.strip().splitlines() or [type(error).__name__])[0][:160]


@dataclass(frozen=True)
class Child:
    """A run's place in a sweep. name: shown in the UI; identity: tags by which it is found again; parameters:
    the swept values that the run key does not hold; state: the file that remembers what arrived there."""

    name: str
    identity: dict[str, str]
    parameters: dict[str, str]
    state: Path


class Session:
    """A connection that stands at this run on the server.

    It looks up what the server has before it makes anything; after a failure it is dropped for a new one.
    """

    def __init__(self, uri: str, study: str, experiment: Experiment, run: Place, child: Child | None = None):
        self.client = client_of(uri)
        self.experiment, self.run = experiment, run
        self.experiment_id = find_study(self.client, uri, run.storage, study)
        name, identity = (child.name, child.identity) if child else (run.path.name, {"run_key": run.run_key})
        self.run_id = self._find_run(name, identity)
        self.grids = self._grids_on_server()

    def _find_run(self, name: str, identity: dict[str, str], **tags: str) -> str:
        start = _first_time(self.run.log)
        return find_run(self.client, self.experiment_id, name, identity, start, tags)

    def _grids_on_server(self) -> dict[int, str | None]:
        """Steps whose picture arrived; with the name of its small twin where only that is still missing."""
        paths = {file.path for file in self.client.list_artifacts(self.run_id, "images")}
        twins = {path: path.removesuffix(".png") + TWIN for path in paths if path.endswith(".png")}
        return {int(path.split("+")[2]): None if twin in paths else twin for path, twin in twins.items()}

    def send_description(self, parameters: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        known = self.client.get_run(self.run_id).data.params
        params = [Param(k, v) for k, v in parameters.items() if k not in known]
        labels = [RunTag(key, str(value)) for key, value in tags.items()]
        self.client.log_batch(self.run_id, params=params, tags=labels)

    def send_dataset(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        manifest = self.run.data / rundir.MANIFEST
        facts = {key: value for key, value in rundir.read_json(manifest).items() if key != "files"}
        splits = {name: split["count"] for name, split in facts.pop("splits").items()}
        dataset = Dataset(
            name=self.run.data.name,
            digest=rundir.sha256_of(manifest)[:36],
            source_type="local",
            source=json.dumps({"uri": str(self.run.data)}),
            profile=json.dumps(facts | splits),
        )
        use = InputTag("mlflow.data.context", "training")
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [use])])

    def send_log(self, start: int, end: int) -> None:
        from mlflow.entities import Metric

        with self.run.log.open("rb") as file:
            file.seek(start)
            points = [json.loads(line) for line in file.read(end - start).splitlines()]
        metrics = [
            Metric(key, float(value), point["time"], point["step"])
            for point in points
            for key, value in point["metrics"].items()
        ]
        for first in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + BATCH])

    def send_grid(self, grid: Path) -> None:
        from PIL import Image

        step = int(grid.stem)
        twin = self.grids.get(step)
        with Image.open(grid) as image:
            if step not in self.grids:
                when = milliseconds(grid)
                self.client.log_image(self.run_id, image, key="samples/ema", step=step, timestamp=when)
            elif twin:  # the server died between the two
                image.thumbnail((256, 256))
                self.client.log_image(self.run_id, image, artifact_file=twin)
        self.grids[step] = None

    def send_checkpoints(self, steps: list[int]) -> None:
        """Every checkpoint on disk as a logged model; the unscored ones that `train.keep` deleted go."""
        models = self._models()
        for step in steps:
            self._register(step, models.get(step))
        for step, model in models.items():
            if step < steps[-1] and step not in steps and not model.metrics:
                self.client.delete_logged_model(model.model_id)

    def _models(self) -> dict[int, Any]:
        query = f"source_run_id = '{self.run_id}'"
        found = self.client.search_logged_models([self.experiment_id], filter_string=query)
        return {int(model.tags["step"]): model for model in found}

    def _register(self, step: int, model: Any) -> None:
        """The weights stay where they are; the model says where that is."""
        from mlflow.entities import LoggedModelOutput

        folder = self.run.step_folder(step)
        if model is None:
            facts = rundir.read_json(folder / "meta.json").get("files", {})
            hashes = {f"sha256.{name}": file["sha256"] for name, file in facts.items()}
            where = {"step": str(step), "path": str(folder), "run_key": self.run.run_key}
            kind = self.experiment.model.name
            model = self.client.create_logged_model(
                self.experiment_id, folder.name, self.run_id, where | hashes, model_type=kind
            )
        if str(model.status) != "READY":
            self.client.finalize_logged_model(model.model_id, "READY")
        linked = self.client.get_run(self.run_id).outputs.model_outputs
        if model.model_id not in {output.model_id for output in linked}:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])

    def send_candidate(self, step: int, scores: Path) -> None:
        """One of the checkpoints among which the best is looked for: a point of the FID's curve."""
        value = rundir.read_json(scores)["scores"]["fid"]
        self._point("selection/fid", value, step, milliseconds(scores))

    def send_choice(self, file: Path) -> None:
        from mlflow.entities import RunTag

        found = rundir.read_json(file)
        self._point("selection/best_step", found["best"], found["scores"][-1]["step"], milliseconds(file))
        protocol = {key: found[key] for key in ("n", "weights", "extractor", "reference")}
        tags = [RunTag(f"selection.{key}", str(value)) for key, value in protocol.items()]
        self.client.log_batch(self.run_id, tags=tags)

    def _point(self, key: str, value: float, step: int, when: int) -> None:
        from mlflow.entities import Metric

        if not self._has(self.run_id, key, step, value):
            model = self._models().get(step)
            metric = Metric(key, float(value), when, step, model_id=model and model.model_id)
            self.client.log_batch(self.run_id, metrics=[metric])

    def send_scores(self, scores: Path) -> None:
        self._score(self.run_id, scores)

    def send_evaluation(self, scores: Path) -> None:
        """An evaluation beside the headline one: a child run."""
        key, weights = scores.parent.name, rundir.read_json(scores)["protocol"]["weights"]
        tags = {"mlflow.parentRunId": self.run_id, "weights": weights}
        child = self._find_run(f"evaluation {key}", {"evaluation_key": key}, **tags)
        self._score(child, scores)
        self.client.set_terminated(child, "FINISHED", milliseconds(scores))

    def _score(self, run_id: str, scores: Path) -> None:
        from mlflow.entities import Metric, RunTag

        content = rundir.read_json(scores)
        step = int(content["protocol"].get("checkpoint") or 0)
        model = self._models().get(step)
        points = [
            Metric(f"eval/{key}", float(value), milliseconds(scores), step, model_id=model and model.model_id)
            for key, value in content["scores"].items()
            if isinstance(value, (int, float)) and not self._has(run_id, f"eval/{key}", step, value)
        ]
        tags = [RunTag(key, value) for key, value in _protocol_tags(content["protocol"]).items()]
        self.client.log_batch(run_id, metrics=points, tags=tags)

    def _has(self, run_id: str, key: str, step: int, value: float) -> bool:
        """A copied file has a new time, and would be another point of the same score."""
        return any((p.step, p.value) == (step, value) for p in self.client.get_metric_history(run_id, key))

    def send_file(self, file: Path, folder: str) -> None:
        self.client.log_artifact(self.run_id, str(file), folder or None)

    def send_status(self, status: str, end: int | None) -> None:
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status, end)


def _first_time(log: Path) -> int:
    """When the run began, in Unix milliseconds: its first point, or now."""
    if log.exists():
        with log.open() as file:
            line = file.readline()
        if line.endswith("\n"):
            return int(json.loads(line)["time"])
    return time.time_ns() // 1_000_000


def milliseconds(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000


def _protocol_tags(protocol: dict[str, Any]) -> dict[str, str]:
    lists = {key: "; ".join(map(str, value)) for key, value in protocol.items() if isinstance(value, list)}
    said = {key: str(value) for key, value in (protocol | lists).items() if value not in (None, "")}
    return {f"protocol.{key}": value for key, value in said.items()}
