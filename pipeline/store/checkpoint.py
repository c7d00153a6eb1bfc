"""TrainState <-> files: one folder per step, atomic, hashed, tensors only.

train/step_00001000/ holds state.safetensors (everything), ema.safetensors (the first EMA's weights, named as
the network's own) and meta.json, which carries the step and the sha256 of both. A folder is on disk whole or
not at all, and is believed only while its hashes verify.
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
from ddpm.networks.layers import InBF16
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.store.files import read_file_facts, read_json, require_file, write_folder_atomically, write_json
from pipeline.store.run import Place, find_scores, find_selections
from pipeline.store.tensors import Tensors

logger = logging.getLogger(__name__)

Facts = dict[str, str | int | bool]

STATE, EMA, META = "state.safetensors", "ema.safetensors", "meta.json"


def save_checkpoint(
    directory: Path, tensors: Tensors, ema: Tensors, step: int, facts: Facts | None = None
) -> None:
    """Write the checkpoint of one step atomically. Contiguous tensors on the CPU, such as `copy_to_cpu` makes."""
    with write_folder_atomically(directory) as temporary:
        _save_file(tensors, temporary / STATE)
        _save_file(ema, temporary / EMA)
        files = {name: read_file_facts(temporary / name) for name in (STATE, EMA)}
        write_json(temporary / META, {"step": step, "files": files, **(facts or {})})


def _save_file(tensors: Tensors, path: Path) -> None:
    """Raises OSError where the file system is at fault, which safetensors says in words of its own."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def copy_to_cpu(tensors: Tensors, into: Tensors) -> Tensors:
    """Copy into the memory of `into` where that fits (touching new pages costs more than the copying): safetensors
    takes neither views nor channels_last."""
    copies = {}
    for name, tensor in tensors.items():
        kept = into.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = kept.copy_(tensor.detach())
    return copies


def list_steps(train: Path, at_most: float = math.inf) -> list[int]:
    """List the steps that have a folder, ascending."""
    names = (re.fullmatch(r"step_(\d+)", path.name) for path in train.glob("step_*"))
    return sorted(step for match in names if match and (step := int(match[1])) <= at_most)


def raise_no_checkpoint(place: Place, which: str) -> NoReturn:
    """Say that a run has not the checkpoint that was asked for, and which ones it has."""
    known = ", ".join(map(str, list_steps(place.train))) or "none"
    raise PipelineError(f"{place.path} has no checkpoint {which} (there are: {known})")


def verify_checkpoint(directory: Path) -> None:
    """Raise PipelineError unless the folder is a whole checkpoint."""
    meta = directory / META
    content = read_json(meta) if meta.exists() else None
    if not isinstance(content, dict) or "files" not in content:
        raise PipelineError(f"{meta} is missing or lists no files: {directory} is not a whole checkpoint")
    for name, facts in content["files"].items():
        require_file(directory / name, facts)


def is_valid(directory: Path) -> bool:
    """Whether the folder carries a checkpoint that verifies."""
    try:
        verify_checkpoint(directory)
    except PipelineError:
        return False
    return True


def find_newest(run: Place, at_most: int) -> int | None:
    """The newest step up to `at_most` whose hashes verify; broken ones are passed over with a warning."""
    for step in reversed(list_steps(run.train, at_most)):
        try:
            verify_checkpoint(run.step_folder(step))
            return step
        except PipelineError as error:
            logger.warning("%s; going back to the checkpoint before it", error)
    return None


def load_checkpoint(directory: Path) -> Tensors:
    """All tensors of a checkpoint, on the CPU."""
    verify_checkpoint(directory)
    return load_file(directory / STATE)


def delete_old_checkpoints(place: Place, at_most: int) -> None:
    """Delete checkpoints up to step `at_most` (those beyond are another command's) but the `train.keep` newest,
    those that the experiment keeps for ever, and those that anything in the run refers to."""
    steps = list_steps(place.train, at_most)[: -place.experiment.train.keep]
    old = [step for step in steps if not place.experiment.keeps_checkpoint(step)]
    try:
        wanted = list_used_steps(place) if old else set()
    except (PipelineError, OSError, KeyError) as error:
        logger.warning("%s; until that is mended, no checkpoint is deleted", error)
        return
    for step in set(old) - wanted:
        shutil.rmtree(place.step_folder(step), ignore_errors=True)


def list_used_steps(run: Place) -> set[int]:
    """The steps that a sample set, even an unfinished one, a score or a selection was made of."""
    drawn = [next(folder.glob("[!.]*.json"), None) for folder in run.path.glob("samples/*")]
    steps = {read_json(file)["protocol"]["checkpoint"] for file in [*drawn, *find_scores(run.path)] if file}
    chosen = [read_json(file)["scores"] for file in find_selections(run.path)]
    return steps | {score["step"] for scores in chosen for score in scores}


def load_weights(directory: Path, which: str) -> Tensors:
    """The network's tensors, `ema` or `raw`. Raises PipelineError where the checkpoint is broken."""
    if which == "ema":
        verify_checkpoint(directory)
        return load_file(directory / EMA)
    state = load_checkpoint(directory)
    return {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}


def create_network(experiment: Experiment, device: torch.device | str = "cpu") -> nn.Module:
    """The experiment's network with its first weights."""
    data, channels = experiment.data, experiment.data.channels
    out_channels = Diffusion(experiment.diffusion).count_out_channels(channels)
    classes = data.labels if experiment.takes_labels else 0
    return accelerate(
        build_network(
            experiment.model, data.image_size, channels, out_channels, experiment.seed, classes, device
        )
    )


@lru_cache(maxsize=1)
def load_network(
    place: Place, device: torch.device, precision: str = "fp32", compiled: bool = False
) -> nn.Module:
    """Load the network of the checkpoint that is sampled and scored: eval mode, no gradients. Kept by the process,
    since one process works on many units. Raises PipelineError where there is no such checkpoint."""
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
    net = InBF16(net) if precision == "bf16" else net
    return cast(nn.Module, torch.compile(net)) if compiled else net
