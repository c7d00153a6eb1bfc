"""Sends each kind of file of a run to MLflow."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import config
from pipeline.drawing.grids import require_picture
from pipeline.errors import ConfigError
from pipeline.store import keys
from pipeline.store.checkpoint import read_meta
from pipeline.store.files import MANIFEST, hash_file, read_json, read_sealed, require_sealed
from pipeline.store.log import read_points
from pipeline.store.run import Place
from pipeline.store.selection import ScoreFile, Selection
from pipeline.store.tars import ShardSetFacts
from pipeline.tracking import models
from pipeline.tracking.mlflow_client import (
    create_client,
    ensure_experiment,
    ensure_run,
    log_batches,
    read_pages,
)

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel


# The UI sorts its charts by the part before the "/"; names without one come last. So the loss is first.
NAMES = {"train/loss": "loss/train"}


@dataclass(frozen=True)
class ChildRun:
    """A trial in the UI: a child of its study's parent run.

    identity: tags by which it is found again; parameters: the swept values; state_file: remembers what arrived there.
    """

    name: str
    identity: dict[str, str]
    parameters: dict[str, str]
    state_file: Path


class RunSender:
    """Sends the files of one run to its run in MLflow. It creates nothing that is there already."""

    def __init__(self, uri: str, study: str, place: Place, child: ChildRun | None = None):
        self.client, self.place = create_client(uri), place
        self.experiment_id = ensure_experiment(self.client, uri, place.storage, study)
        first = read_points(place.log)[:1]
        self.start = first[0]["time"] if first else read_mtime(place.experiment_yaml)  # Unix milliseconds
        name = child.name if child else name_run(place)
        identity = child.identity if child else {"run_key": place.run_key}
        self.run_id = ensure_run(self.client, self.experiment_id, name, identity, self.start)

    def send_parameters_and_tags(self, parameters: dict[str, str], tags: dict[str, str]) -> None:
        """Send the tags, and the parameters that are not there yet: MLflow lets none of them change."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        new = [Param(*item) for item in parameters.items() if item[0] not in known]
        self.client.log_batch(self.run_id, params=new)
        log_batches(self.client, self.run_id, [], tags)

    def send_dataset(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        manifest = self.place.data / MANIFEST
        content = read_json(manifest, ShardSetFacts)
        facts = {key: value for key, value in content.items() if key not in ("files", "folder", "splits")}
        facts |= {name: split["count"] for name, split in content["splits"].items()}
        digest, source = hash_file(manifest)[:36], json.dumps({"uri": str(self.place.data)})
        dataset = Dataset(self.place.data.name, digest, "local", source, profile=json.dumps(facts))
        context = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, context)])

    def send_log(self, start: int, end: int) -> None:
        """Send the points between two byte offsets of the log."""
        points = [
            (NAMES.get(key, key), float(value), point["time"], point["step"])
            for point in read_points(self.place.log, start, end)
            for key, value in point["metrics"].items()
        ]
        log_batches(self.client, self.run_id, points)

    def send_grid(self, grid: Path) -> None:
        from PIL import Image

        step = int(require_picture(grid).stem)
        # MLflow's own names hold the time and a random part; under this one, a picture sent again replaces itself.
        name = f"images/samples~ema+step+{step}+timestamp+{step}+{self.place.run_key}"
        with Image.open(grid) as image:
            self.client.log_image(self.run_id, image, artifact_file=f"{name}.png")
            image.thumbnail((256, 256))
            self.client.log_image(self.run_id, image, artifact_file=f"{name}+compressed.webp")
        self.client.set_tag(self.run_id, "mlflow.loggedImages", True)

    def update_models(self, steps: list[int]) -> None:
        """Make every checkpoint on disk a logged model. Delete models without scores whose checkpoint is deleted."""
        from mlflow.entities import LoggedModelOutput

        known = self._find_models()
        outputs = self.client.get_run(self.run_id).outputs
        linked = {output.model_id for output in outputs.model_outputs} if outputs else set()
        for step in steps:
            model = known.get(step) or self._create_model(step)
            if str(model.status) != "READY":
                self.client.finalize_logged_model(model.model_id, "READY")
            if model.model_id not in linked:
                self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        for step, model in known.items():
            is_used = model.metrics or models.WEIGHTS_TAG in model.tags
            if step < steps[-1] and step not in steps and not is_used:
                self.client.delete_logged_model(model.model_id)

    def _find_models(self) -> dict[int, LoggedModel]:
        query = f"source_run_id = '{self.run_id}'"
        search = partial(self.client.search_logged_models, [self.experiment_id], query)
        return {int(model.tags["step"]): model for model in read_pages(search)}

    def _create_model(self, step: int) -> LoggedModel:
        """Make a logged model that names the file of a checkpoint's weights, which stay there."""
        folder, place = self.place.locate_step(step), self.place
        tags = {"step": str(step), "path": str(folder), "run_key": place.run_key}
        files = read_meta(folder)["files"]
        tags |= {f"sha256.{name}": facts["sha256"] for name, facts in files.items()}
        ids, kind = (self.experiment_id, folder.name, self.run_id), place.experiment.model.name
        return self.client.create_logged_model(*ids, tags, model_type=kind)

    def send_weights(self, step: int) -> LoggedModel:
        """Send the weights of a checkpoint; return its logged model, which can be loaded then."""
        model = self._find_models()[step]
        models.send_weights(self.client, model, self.place, step)
        return model

    def send_candidate(self, step: int, file: Path) -> None:
        """Send the FID of a candidate for the selection and its error, as points of curves."""
        scores = read_sealed(file, ScoreFile)["scores"]
        values = {f"selection/{name}": scores.get(name) for name in ("fid", "fid_se")}
        self._send_values(file, step, {name: value for name, value in values.items() if value is not None})

    def send_selection(self, file: Path) -> None:
        """Send which checkpoint was chosen, and how."""
        found = read_sealed(file, Selection)
        tags = {f"selection.{key}": str(found[key]) for key in ("n", "weights", "extractor", "reference")}
        self._send_values(file, found["scores"][-1]["step"], {"selection/best_step": found["best"]}, tags)

    def send_scores(self, file: Path, run_id: str = "") -> None:
        """Send the headline evaluation; another one to the run `run_id`."""
        found = read_sealed(file, ScoreFile)
        scores, protocol = found["scores"], found["protocol"]
        values = {k: v for k, v in scores.items() if isinstance(v, int | float)}
        texts = {k: "; ".join(map(str, v)) if isinstance(v, list) else v for k, v in protocol.items()}
        tags = {f"protocol.{k}": str(v) for k, v in texts.items() if v not in (None, "")}
        self._send_values(file, int(protocol.get("checkpoint") or 0), values, tags, run_id)

    def send_child_evaluation(self, file: Path) -> None:
        """Send an evaluation that is not the headline as a child run."""
        name, identity = f"evaluation {file.parent.name}", {"evaluation_key": file.parent.name}
        tags = {
            "mlflow.parentRunId": self.run_id,
            "weights": str(read_sealed(file, ScoreFile)["protocol"]["weights"]),
        }
        child = ensure_run(self.client, self.experiment_id, name, identity, self.start, **tags)
        self.send_scores(file, child)
        self.client.set_terminated(child, "FINISHED", max(read_mtime(file), self.start))

    def _send_values(
        self, file: Path, step: int, values: dict[str, float], tags: dict[str, str] | None = None,
        run_id: str = "",
    ) -> None:  # fmt: skip
        """Log the values of a file, each once, for the run and for the model of their checkpoint."""
        model, run_id = self._find_models().get(step), run_id or self.run_id
        points = [
            (key, float(value), read_mtime(file), step)
            for key, value in values.items()
            # a copied file has a new time, and would make a second point
            if all((p.step, p.value) != (step, value) for p in self.client.get_metric_history(run_id, key))
        ]
        log_batches(self.client, run_id, points, tags or {}, model.model_id if model else None)

    def send_file(self, file: Path, folder: str) -> None:
        self.client.log_artifact(self.run_id, str(require_sealed(file) if folder else file), folder or None)

    def send_status(self, status: str, end: int | None) -> None:
        """Send the status; end: Unix milliseconds. No run ends before it began."""
        now = time.time_ns() // 1_000_000
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status, max(end or now, self.start))


def name_run(place: Place) -> str:
    """Return a run's name with its differences from the experiment's file: 'digits-0eed1d714017 lr=0.0001 seed=1'."""
    try:
        usual = config.load_experiment(place.experiment.name, [])
    except ConfigError:  # it has another name, or none
        return place.name
    own, known = (
        config.flatten({"data": config.to_dict(e.data), **keys.collect_run_settings(e, whole=True)})
        for e in (place.experiment, usual)
    )
    changed = [(key.rpartition(".")[2], value) for key, value in own.items() if value != known.get(key)]
    return " ".join([place.name, *(f"{key}={value!s:.30}" for key, value in changed)])[:200]


def read_mtime(path: Path) -> int:
    """Return when a file was written, in Unix milliseconds; now, if it is not there."""
    return (path.stat().st_mtime_ns if path.exists() else time.time_ns()) // 1_000_000
