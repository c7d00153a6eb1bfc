"""What was trained, ready to draw: a run, or a folder in the diffusers layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.engine.find import find_run, read_place
from pipeline.store import checkpoint, diffusers_layout
from pipeline.store.run import EXPERIMENT, Place
from pipeline.store.selection import fill_in_selection
from pipeline.store.tensors import Tensors

Settings = dict[str, Any]


def read_model(name: str, root: Path) -> tuple[Settings, Tensors]:
    """Read the settings and the weights of a run, or of a folder in the diffusers layout, for `ddpm.build_model`."""
    path = Path(name).expanduser().absolute()
    if path.is_dir() and not (path / EXPERIMENT).exists():
        experiment = diffusers_layout.make_published_experiment(path)
        weights, source = diffusers_layout.read_weights(experiment), path.name
    else:
        place = choose_checkpoint(read_place(find_run(name, root)))
        experiment = place.experiment
        step, which = experiment.checkpoint_step, experiment.sample.weights
        weights = checkpoint.load_weights(place.step_folder(step), which, experiment.ema_number)
        source = f"{experiment.weights_kind} weights of step {step} of {place.name}"
    return {**checkpoint.describe_model(experiment), "source": source}, weights


def choose_checkpoint(place: Place) -> Place:
    """Return the place with the checkpoint that its run samples, or the newest one while that is not there."""
    place = fill_in_selection(place) or place
    sample, steps = place.experiment.sample, checkpoint.list_steps(place.train)
    is_known = sample.checkpoint != "best" or place.experiment.selected
    if not (is_known and place.experiment.checkpoint_step in steps):
        if not steps:
            checkpoint.raise_no_checkpoint(place, "yet")
        place = place.of(replace(place.experiment, sample=replace(sample, checkpoint=steps[-1])))
    checkpoint.verify_step(place, place.experiment.checkpoint_step, "seal")
    return place
