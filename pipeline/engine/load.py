"""Loads trained models, ready to draw: from a run, a folder in the diffusers layout, or MLflow."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pipeline import tracking
from pipeline.config.checks import Tree
from pipeline.engine.find import find_run, read_place
from pipeline.store import checkpoint, diffusers_layout
from pipeline.store.run import EXPERIMENT, Place, list_steps
from pipeline.store.selection import fill_in_selection
from pipeline.store.tensors import Tensors


def read_named_model(name: str, root: Path, uri: str | None = None) -> tuple[Tree, Tensors]:
    """Read the settings and weights of a run, a folder in the diffusers layout, or a models:/ address of MLflow's.

    uri: the tracking server of such an address; default: MLFLOW_TRACKING_URI, else the store of the storage root.
    """
    if name.startswith(tracking.PREFIX):
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or tracking.find_default_uri(root)
        return tracking.fetch_model(name, uri)[1:]
    path = Path(name).expanduser().absolute()
    if not path.is_dir() or (path / EXPERIMENT).exists():
        return checkpoint.read_model(choose_checkpoint(read_place(find_run(name, root))))
    experiment = diffusers_layout.make_published_experiment(path)
    settings = {**checkpoint.describe_model(experiment), "source": path.name}
    return settings, diffusers_layout.read_weights(experiment)


def choose_checkpoint(place: Place) -> Place:
    """Return the place with the checkpoint that its run samples, or with the newest one until that exists."""
    place = fill_in_selection(place) or place
    sample, steps = place.experiment.sample, list_steps(place.train)
    is_known = sample.checkpoint != "best" or place.experiment.selected
    if not (is_known and place.experiment.checkpoint_step in steps):
        if not steps:
            checkpoint.raise_no_checkpoint(place, "yet")
        newest = replace(place.experiment, sample=replace(sample, checkpoint=steps[-1]))
        place = place.replace_experiment(newest)
    return place
