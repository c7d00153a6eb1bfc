"""Checkpoints: one folder per step, written atomically, with hashes.

train/step_00001000/ holds state.safetensors (everything), ema.safetensors (the first EMA's weights, named as
the network's own) and meta.json, which carries the step and the sha256 of both. A folder counts only while its
hashes are right.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from functools import lru_cache
from pathlib import Path
from typing import NoReturn, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm.diffusion import Diffusion
from ddpm.kernels import accelerate
from ddpm.networks.build import build_network
from ddpm.networks.layers import BF16Network
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.store.files import read_file_facts, read_json, require_file, write_atomically, write_json
from pipeline.store.run import Place, find_sample_facts, find_scores, find_selections
from pipeline.store.tensors import Tensors

logger = logging.getLogger(__name__)

Facts = dict[str, str | int | bool]

STATE, EMA, META = "state.safetensors", "ema.safetensors", "meta.json"


def save_checkpoint(
    directory: Path, tensors: Tensors, ema: Tensors, step: int, facts: Facts | None = None
) -> None:
    """Write the checkpoint of one step atomically; its tensors must be contiguous and on the CPU."""
    with write_atomically(directory, folder=True) as temporary:
        _save_file(tensors, temporary / STATE)
        _save_file(ema, temporary / EMA)
        files = {name: read_file_facts(temporary / name) for name in (STATE, EMA)}
        write_json(temporary / META, {"step": step, "files": files, **(facts or {})})


def _save_file(tensors: Tensors, path: Path) -> None:
    """Write safetensors; raise its disk errors as OSError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def copy_to_cpu(tensors: Tensors, into: Tensors) -> Tensors:
    """Copy tensors to the CPU, into the memory of `into` if it fits: touching new pages costs more than the copy.

    Safetensors takes neither views nor channels_last.
    """
    copies = {}
    for name, tensor in tensors.items():
        copy = into.get(name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = copy.copy_(tensor.detach())
    return copies


def list_steps(train: Path, at_most: float = math.inf) -> list[int]:
    """Return the steps with a checkpoint folder, ascending."""
    names = (re.fullmatch(r"step_(\d+)", path.name) for path in train.glob("step_*"))
    return sorted(step for match in names if match and (step := int(match[1])) <= at_most)


def raise_no_checkpoint(place: Place, which: str) -> NoReturn:
    """Raise the error for a missing checkpoint, with the steps that exist."""
    known = ", ".join(map(str, list_steps(place.train))) or "none"
    raise PipelineError(f"{place.path} has no checkpoint {which} (there are: {known})")


def verify_checkpoint(directory: Path) -> None:
    """Raise PipelineError unless the folder holds a complete checkpoint."""
    meta = directory / META
    content = read_json(meta) if meta.exists() else None
    if not isinstance(content, dict) or "files" not in content:
        raise PipelineError(f"{meta} is missing or lists no files: {directory} is not a complete checkpoint")
    for name, facts in content["files"].items():
        require_file(directory / name, facts)


def is_valid(directory: Path) -> bool:
    """Return whether the folder holds a complete checkpoint."""
    try:
        verify_checkpoint(directory)
    except PipelineError:
        return False
    return True


def find_newest_step(run: Place, at_most: int) -> int | None:
    """Return the newest step up to `at_most` with a valid checkpoint; warn of broken ones."""
    for step in reversed(list_steps(run.train, at_most)):
        try:
            verify_checkpoint(run.step_folder(step))
            return step
        except PipelineError as error:
            logger.warning("%s; going back to the checkpoint before it", error)
    return None


def load_checkpoint(directory: Path) -> Tensors:
    """Load all tensors of a checkpoint on the CPU."""
    verify_checkpoint(directory)
    return load_file(directory / STATE)


def delete_old_checkpoints(place: Place, at_most: int) -> None:
    """Delete old checkpoints, except the `train.keep` newest, those that the experiment keeps, and those in use.

    Those beyond step `at_most` are another command's.
    """
    steps = list_steps(place.train, at_most)[: -place.experiment.train.keep]
    old = [step for step in steps if not place.experiment.keeps_checkpoint(step)]
    try:
        used = list_used_steps(place) if old else set()
    except (PipelineError, OSError, KeyError) as error:
        logger.warning("%s; until that is mended, no checkpoint is deleted", error)
        return
    for step in set(old) - used:
        shutil.rmtree(place.step_folder(step), ignore_errors=True)


def list_used_steps(run: Place) -> set[int]:
    """Return the steps that a sample set, even an unfinished one, a score or a selection uses."""
    files = [*find_sample_facts(run.path), *find_scores(run.path)]
    steps = {read_json(file)["protocol"]["checkpoint"] for file in files}
    selected = [read_json(file)["scores"] for file in find_selections(run.path)]
    return steps | {score["step"] for scores in selected for score in scores}


def load_weights(directory: Path, which: str) -> Tensors:
    """Return the network's tensors, `ema` or `raw`. Raises PipelineError where the checkpoint is broken."""
    if which == "ema":
        verify_checkpoint(directory)
        return load_file(directory / EMA)
    state = load_checkpoint(directory)
    return {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}


def create_network(experiment: Experiment, device: torch.device | str = "cpu") -> nn.Module:
    """Build the experiment's network with its initial weights."""
    data, seed = experiment.data, experiment.seed
    outputs = Diffusion(experiment.diffusion).count_output_channels(data.channels)
    labels = data.labels if experiment.takes_labels else 0
    net = build_network(experiment.model, data.image_size, data.channels, outputs, seed, labels, device)
    return accelerate(net)


@lru_cache(maxsize=1)
def load_network(
    place: Place, device: torch.device, precision: str = "fp32", compiled: bool = False
) -> nn.Module:
    """Load the network of the selected checkpoint in eval mode; cached, since one process runs many units.

    Raises PipelineError where there is no such checkpoint.
    """
    step, experiment = place.experiment.checkpoint_step, place.experiment
    directory = place.step_folder(step)
    if not directory.is_dir():
        raise_no_checkpoint(place, f"of step {step}")
    net = create_network(experiment, "meta")
    net.to_empty(device="cpu")
    try:
        net.load_state_dict(load_weights(directory, experiment.sample.weights))
    except RuntimeError as error:
        raise PipelineError(f"{directory} holds another network: {error}") from error
    net = net.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    net = BF16Network(net) if precision == "bf16" else net
    return cast(nn.Module, torch.compile(net)) if compiled else net
