"""One connection to a tracking server that stands at one run: how each kind of file of a run is sent."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pipeline.store.checkpoint import META
from pipeline.store.files import MANIFEST, read_json, sha256_of
from pipeline.store.log import read_points
from pipeline.store.run import Place
from pipeline.tracking.client import connect, find_run, find_study, log

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

Protocol = dict[str, str | int | float | bool | list[str] | None]


class Scores(TypedDict):
    """The part of a metrics.json that the server gets."""

    scores: dict[str, float]
    protocol: Protocol


@dataclass(frozen=True)
class Child:
    """A run's place in a sweep. name: shown in the UI; identity: tags by which it is found again; parameters:
    the swept values that the run key does not hold; state: the file that remembers what arrived there."""

    name: str
    identity: dict[str, str]
    parameters: dict[str, str]
    state: Path


class Session:
    """Looks up what the server has before it makes anything; after a failure it is dropped for a new one."""

    def __init__(self, uri: str, study: str, place: Place, child: Child | None = None):
        self.client, self.place = connect(uri), place
        self.experiment_id = find_study(self.client, uri, place.storage, study)
        first = read_points(place.log)[:1]
        self.start = first[0]["time"] if first else time.time_ns() // 1_000_000  # Unix milliseconds
        name, identity = (child.name, child.identity) if child else (place.name, {"run_key": place.run_key})
        self.run_id = find_run(self.client, self.experiment_id, name, identity, self.start)

    def send_description(self, parameters: dict[str, str], tags: dict[str, str]) -> None:
        known = self.client.get_run(self.run_id).data.params
        new = {key: value for key, value in parameters.items() if key not in known}
        log(self.client, self.run_id, tags=tags, params=new)

    def send_dataset(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        manifest = self.place.data / MANIFEST
        facts = {key: value for key, value in read_json(manifest).items() if key != "files"}
        splits = {name: split["count"] for name, split in facts.pop("splits").items()}
        dataset = Dataset(
            name=self.place.data.name,
            digest=sha256_of(manifest)[:36],
            source_type="local",
            source=json.dumps({"uri": str(self.place.data)}),
            profile=json.dumps(facts | splits),
        )
        used = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
        self.client.log_inputs(self.run_id, [used])

    def send_log(self, start: int, end: int) -> None:
        """Send the points between two places of the log, in bytes."""
        points = [
            (key, float(value), point["time"], point["step"])
            for point in read_points(self.place.log, start, end)
            for key, value in point["metrics"].items()
        ]
        log(self.client, self.run_id, points)

    def send_grid(self, grid: Path) -> None:
        """Send a picture and its small copy. MLflow's own names hold the time and a random part; under these, one that
        is sent again replaces what is there."""
        from PIL import Image

        step = int(grid.stem)
        name = f"images/samples~ema+step+{step}+timestamp+{step}+{self.place.run_key}"
        with Image.open(grid) as image:
            self.client.log_image(self.run_id, image, artifact_file=f"{name}.png")
            image.thumbnail((256, 256))
            self.client.log_image(self.run_id, image, artifact_file=f"{name}+compressed.webp")
        self.client.set_tag(self.run_id, "mlflow.loggedImages", True)

    def send_checkpoints(self, steps: list[int]) -> None:
        """Make every checkpoint on disk a logged model; the unscored ones that `train.keep` deleted go."""
        from mlflow.entities import LoggedModelOutput

        models = self._find_models()
        outputs = self.client.get_run(self.run_id).outputs
        linked = {output.model_id for output in outputs.model_outputs} if outputs else set()
        for step in steps:
            model = models.get(step) or self._create_model(step)
            if str(model.status) != "READY":
                self.client.finalize_logged_model(model.model_id, "READY")
            if model.model_id not in linked:
                self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        for step, model in models.items():
            if step < steps[-1] and step not in steps and not model.metrics:
                self.client.delete_logged_model(model.model_id)

    def _find_models(self) -> dict[int, LoggedModel]:
        query = f"source_run_id = '{self.run_id}'"
        found = self.client.search_logged_models([self.experiment_id], filter_string=query)
        return {int(model.tags["step"]): model for model in found}

    def _create_model(self, step: int) -> LoggedModel:
        """The weights stay where they are; the model says where that is."""
        folder = self.place.step_folder(step)
        files = read_json(folder / META).get("files", {})
        tags = {"step": str(step), "path": str(folder), "run_key": self.place.run_key}
        tags |= {f"sha256.{name}": facts["sha256"] for name, facts in files.items()}
        return self.client.create_logged_model(
            self.experiment_id, folder.name, self.run_id, tags, model_type=self.place.experiment.model.name
        )

    def send_candidate(self, step: int, file: Path) -> None:
        """Send the scores of a checkpoint among which the best is looked for: a point of the FID's curve."""
        scores: Scores = read_json(file)
        self._log(self.run_id, {"selection/fid": scores["scores"]["fid"]}, {}, step, file)

    def send_choice(self, file: Path) -> None:
        found = read_json(file)
        tags = {f"selection.{key}": str(found[key]) for key in ("n", "weights", "extractor", "reference")}
        last = found["scores"][-1]["step"]
        self._log(self.run_id, {"selection/best_step": found["best"]}, tags, last, file)

    def send_scores(self, file: Path, run_id: str = "") -> None:
        """Send the headline evaluation, or another one to a run of its own."""
        content: Scores = read_json(file)
        protocol = content["protocol"]
        scores = {f"eval/{k}": v for k, v in content["scores"].items() if isinstance(v, (int, float))}
        texts = {k: "; ".join(map(str, v)) if isinstance(v, list) else v for k, v in protocol.items()}
        tags = {f"protocol.{k}": str(v) for k, v in texts.items() if v not in (None, "")}
        step = int(str(protocol.get("checkpoint") or 0))
        self._log(run_id or self.run_id, scores, tags, step, file)

    def send_evaluation(self, file: Path) -> None:
        """Send an evaluation beside the headline one: a child run."""
        content: Scores = read_json(file)
        name, identity = f"evaluation {file.parent.name}", {"evaluation_key": file.parent.name}
        tags = {"mlflow.parentRunId": self.run_id, "weights": str(content["protocol"]["weights"])}
        child = find_run(self.client, self.experiment_id, name, identity, self.start, **tags)
        self.send_scores(file, child)
        self.client.set_terminated(child, "FINISHED", milliseconds(file))

    def _log(
        self, run_id: str, values: dict[str, float], tags: dict[str, str], step: int, file: Path
    ) -> None:
        """Log values at the model of their checkpoint, each once: a copied file has a new time, and would be another
        point of the same score."""
        model = self._find_models().get(step)
        points = [
            (key, float(value), milliseconds(file), step)
            for key, value in values.items()
            if all((p.step, p.value) != (step, value) for p in self.client.get_metric_history(run_id, key))
        ]
        log(self.client, run_id, points, tags, model_id=model.model_id if model else None)

    def send_file(self, file: Path, folder: str) -> None:
        self.client.log_artifact(self.run_id, str(file), folder or None)

    def send_status(self, status: str, end: int | None) -> None:
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status, end)


def milliseconds(path: Path) -> int:
    """Return when a file was written, in Unix milliseconds."""
    return path.stat().st_mtime_ns // 1_000_000
