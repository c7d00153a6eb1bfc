"""Models in MLflow that hold their weights, and their names in its registry."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import ddpm
from ddpm.networks.custom import CustomConfig
from pipeline.config import Experiment, load_experiment
from pipeline.config.checks import Tree
from pipeline.errors import ConfigError, PipelineError, hide_password
from pipeline.store import checkpoint
from pipeline.store.files import TEMPORARY, UMASK, read_json, write_json
from pipeline.store.run import EXPERIMENT, Place, list_steps
from pipeline.store.tensors import Tensors, load_tensors, save_tensors
from pipeline.tracking.mlflow_client import create_client, read_pages, translate_errors, use_server

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import Model

PREFIX = "models:/"  # of the address of a model
WEIGHTS, SETTINGS = "weights.safetensors", "settings.json"
VERSIONS_TAG = "mlflow.modelVersions"  # of a logged model, from which its page knows that it is registered
WEIGHTS_TAG = "weights"  # of a logged model that holds them: their kind
OPTIONS = ("n", "seed", "label", "steps")  # of `predict`
REQUIREMENTS = ["mlflow>=3.17", "torch>=2.7", "safetensors", "numpy"]


def list_model_steps(place: Place, selected: Place | None, limit: float) -> list[int]:
    """List the steps whose weights MLflow gets: the last and the selected one, if they have at most `limit` bytes."""
    steps = {place.experiment.train.steps, *([selected.experiment.checkpoint_step] if selected else [])}
    kept = [step for step in list_steps(place.train) if step in steps]
    files = {step: checkpoint.read_meta(place.locate_step(step))["files"] for step in kept}
    return [step for step, facts in files.items() if facts[checkpoint.EMA]["bytes"] <= limit]


def send_weights(client: MlflowClient, model: LoggedModel, place: Place, step: int) -> None:
    """Send the weights of a checkpoint and the code that draws from them as the files of a logged model."""
    from mlflow.models import Model

    experiment = place.experiment
    sample = replace(experiment.sample, checkpoint=step)
    settings, tensors = checkpoint.read_model(place.replace_experiment(replace(experiment, sample=sample)))
    with TemporaryDirectory(prefix=TEMPORARY, dir=place.path) as scratch:
        weights, described = Path(scratch, WEIGHTS), Path(scratch, SETTINGS)
        save_tensors(tensors, weights, {"format": "pt"})
        write_json(described, settings)
        files = {"weights": weights, "settings": described, "experiment": place.experiment_yaml}
        card = Model(model_id=model.model_id, run_id=model.source_run_id)
        own = experiment.model.list_code() if isinstance(experiment.model, CustomConfig) else []
        folder = _write_model(Path(scratch, "model"), files, card, own)
        client.log_model_artifacts(model.model_id, str(folder))
    client.set_logged_model_tags(model.model_id, {WEIGHTS_TAG: experiment.weights_kind})


def _write_model(folder: Path, files: Mapping[str, Path], card: Model, own: list[str]) -> Path:
    """Write a model as MLflow loads it: its files, `ddpm`, the code of a custom network, and the code that draws."""
    import mlflow
    from mlflow.types import ColSpec, Schema, TensorSpec

    columns: list[ColSpec | TensorSpec] = [ColSpec("long", name, required=name == "n") for name in OPTIONS]
    with warnings.catch_warnings():
        # It wants an example of the input, which would only repeat the signature.
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            folder,
            mlflow_model=card,
            python_model=str(Path(__file__).with_name("drawing_model.py")),
            code_paths=[str(Path(ddpm.__file__).parent), *own],
            artifacts={name: str(file) for name, file in files.items()},
            signature=mlflow.models.ModelSignature(Schema(columns)),
            pip_requirements=REQUIREMENTS,  # without them it would load the model in another process
        )
    flavor = card.flavors["python_function"]  # with absolute paths of this machine
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    card.save(str(folder / "MLmodel"))
    for file in filter(Path.is_file, folder.rglob("*")):
        file.chmod(0o666 & ~UMASK)  # a colleague loads it too; safetensors lets only the owner read its files
    return folder


def register_model(uri: str, model: LoggedModel, name: str, alias: str | None) -> str:
    """Make a logged model a version of `name` in the registry, once, and give it the alias; return its address."""
    client = create_client(uri)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"{PREFIX}{model.model_id}"
    search = partial(client.search_model_versions, f"name='{name}'")
    known = [found for found in read_pages(search) if found.source == source]
    if not known:
        with use_server(uri):  # the files of the version are looked up there
            known.append(
                client.create_model_version(name, source, model.source_run_id, model_id=model.model_id)
            )
    version = known[0].version
    found = json.loads(client.get_logged_model(model.model_id).tags.get(VERSIONS_TAG, "[]"))
    if (entry := {"name": name, "version": version}) not in found:
        client.set_logged_model_tags(model.model_id, {VERSIONS_TAG: json.dumps([*found, entry])})
    if alias is None:
        return f"{PREFIX}{name}/{version}"
    client.set_registered_model_alias(name, alias, version)
    return f"{PREFIX}{name}@{alias}"


def fetch_model(address: str, uri: str) -> tuple[Experiment, Tree, Tensors]:
    """Fetch a model by its address (models:/NAME@ALIAS, /NAME/VERSION, /ID): experiment, settings and weights.

    No code of it runs. Raises PipelineError.
    """
    made_by = "`ddpm register RUN --alias NAME` makes such a model"
    if not re.fullmatch(f"{PREFIX}[^/@]+([/@][^/@]+)?", address):
        raise ConfigError(
            f"{address} is no address of a model: {PREFIX}NAME@ALIAS, {PREFIX}NAME/VERSION, {PREFIX}ID"
        )
    with TemporaryDirectory() as folder:
        with translate_errors(uri, f"{address} cannot be fetched from {hide_password(uri)}", made_by):
            create_client(uri)
            import mlflow

            try:
                with use_server(uri):  # the name is looked up there
                    found = mlflow.artifacts.download_artifacts(f"{address}/artifacts", dst_path=folder)
            except mlflow.MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                raise PipelineError(f"{hide_password(uri)} has no model {address}; {made_by}") from error
        files, remedy = Path(found), "register its run again"
        settings = read_json(files / SETTINGS, Tree, remedy)
        return load_experiment(str(files / EXPERIMENT), []), settings, load_tensors(files / WEIGHTS, remedy)
