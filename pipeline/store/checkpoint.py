"""Checkpoints: one folder per step, written atomically, with hashes.

train/step_00001000/ holds state.safetensors (everything), ema.safetensors (the first EMA's weights, named as
the network's own) and meta.json, which carries the step, the run key and the sha256 of both. A folder is valid only
while these are right. Without the state it is complete for scoring, never for resuming (train.keep_steps).
"""

import logging
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, NotRequired, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from typing_extensions import TypedDict

from ddpm import model
from ddpm.config import DiffusionConfig, Precision
from ddpm.diffusion import Diffusion
from ddpm.graphs import prepare_network
from ddpm.sampler import run_image_chains
from ddpm.training import describe_mismatch
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.store import files
from pipeline.store.run import Place, find_sample_facts, find_scores, find_selections, list_steps
from pipeline.store.tensors import Tensors, save_tensors

logger = logging.getLogger(__name__)

STATE, EMA, META = "state.safetensors", "ema.safetensors", "meta.json"


class Meta(TypedDict):
    """The content of meta.json. Checkpoints of older versions lack some. The last four: how the step was computed."""

    step: int
    files: dict[str, files.FileFacts]
    run_key: NotRequired[str]
    accumulate: NotRequired[int]
    compile: NotRequired[bool]
    graph: NotRequired[bool]
    deterministic: NotRequired[bool]


def save_checkpoint(directory: Path, tensors: Tensors, ema: Tensors, step: int, **facts: str | int) -> None:
    """Write the checkpoint of one step atomically; its tensors must be contiguous and on the CPU."""
    with files.write_atomically(directory, folder=True) as temporary:
        save_tensors(tensors, temporary / STATE)
        save_tensors(ema, temporary / EMA)
        listed = {name: files.read_file_facts(temporary / name) for name in (STATE, EMA)}
        files.write_json(temporary / META, {"step": step, "files": listed, **facts})
    files.note_times(directory / META, listed)  # after the move, which changes times


def save_untrained(place: Place, tensors: Tensors) -> None:
    """Write a network that was not trained here as the checkpoint of step `train.steps`."""
    state, step = {f"net.{name}": tensor for name, tensor in tensors.items()}, place.experiment.train.steps
    save_checkpoint(place.locate_step(step), state, tensors, step, run_key=place.run_key)


def copy_to_cpu(tensors: Tensors, into: Tensors) -> Tensors:
    """Copy tensors to the CPU, into the memory of `into` if it fits, since new memory costs more than the copy.

    Safetensors takes neither views nor channels_last.
    """
    copies = {}
    for name, tensor in tensors.items():
        copy = into.get(name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = copy.copy_(tensor.detach())
    return copies


def raise_no_checkpoint(place: Place, which: str) -> NoReturn:
    known = ", ".join(map(str, list_steps(place.train))) or "none"
    raise PipelineError(f"{place.path} has no checkpoint {which} (there are: {known})")


def read_meta(directory: Path) -> Meta:
    """Read the meta file of a checkpoint. Raises PipelineError if it is not complete, or of another step or run."""
    meta = files.read_json(directory / META, Meta, "it is no complete checkpoint")
    run, key = directory.parent.parent.name, meta.get("run_key", "")
    if directory.name != f"step_{meta['step']:08d}" or not run.endswith(key):
        raise PipelineError(f"{directory} holds the checkpoint of step {meta['step']} of a run {key}")
    if EMA not in meta["files"]:
        raise PipelineError(f"{directory / META} does not list {EMA}: it is not complete")
    return meta


def verify_checkpoint(directory: Path, check: files.Check = "sha256") -> bool:
    """Return whether training can continue from it; checkpoints of train.keep_steps may hold only the EMA.

    Raises PipelineError unless the folder holds the complete checkpoint of its step and run.
    """
    listed = read_meta(directory)["files"]
    files.require_files(directory / META, listed, check)
    return STATE in listed


def verify_step(place: Place, step: int, check: files.Check = "sha256") -> bool:
    """Verify the checkpoint of a step as `verify_checkpoint` does, and that it is of the run's network."""
    experiment, folder = place.experiment, place.locate_step(step)
    has_state = verify_checkpoint(folder, check)
    if not has_state and name_weights_file(experiment.sample.weights, experiment.ema_number) == STATE:
        remedy = "use sample.weights=ema, of the first train.ema_decay"
        raise PipelineError(f"{folder} holds the EMA alone (train.keep_steps); {remedy}")
    kind, known = cast(Any, experiment.model), experiment.data.limit or 0
    own = _list_tensors(kind, experiment.diffusion, experiment.data.shape, experiment.num_classes, known)
    for file, prefix in ((EMA, ""), *([(STATE, "net.")] if has_state else [])):
        try:
            with safe_open(folder / file, "pt") as stored:  # no tensor is read before it is used
                given = {n: stored.get_tensor(n) for n in stored.keys() if n.startswith(prefix)}  # noqa: SIM118
        except SafetensorError as error:
            raise PipelineError(f"{folder / file} holds no tensors ({error})") from error
        if fault := describe_mismatch({f"{prefix}{name}": tensor for name, tensor in own.items()}, given):
            raise PipelineError(f"{folder} holds another network: {fault}")
    return has_state


# The trials of a sweep have few networks; building one takes as long as all other checks.
@lru_cache(maxsize=32)
def _list_tensors(
    config: Any, diffusion: DiffusionConfig, shape: tuple[int, int, int], labels: int, known: int
) -> Tensors:
    net = model.create_network(config, Diffusion(diffusion), shape, labels, "meta", known_images=known)
    return dict(net.state_dict())


def is_valid(place: Place, step: int) -> bool:
    with suppress(PipelineError):
        verify_step(place, step, "seal")
        return True
    return False


def find_newest_step(run: Place, at_most: int) -> int | None:
    """Return the newest step up to `at_most` with a valid checkpoint; warn of broken ones."""
    for step in reversed(list_steps(run.train, at_most)):
        try:
            if verify_step(run, step):
                return step
        except PipelineError as error:
            logger.warning("%s; continuing from the checkpoint before it", error)
    return None


def load_checkpoint(directory: Path) -> Tensors:
    """Load all tensors of a checkpoint on the CPU. Raises PipelineError if the EMA alone is there."""
    if not verify_checkpoint(directory):
        raise PipelineError(f"{directory} holds the EMA alone (train.keep_steps): nothing resumes from it")
    return load_file(directory / STATE)


def delete_old_checkpoints(place: Place, at_most: int) -> None:
    """Delete old checkpoints, except the `train.keep` newest, those that the experiment keeps, and those in use.

    Of `train.keep_steps` the EMA stays. Those beyond step `at_most` are another command's.
    """
    train, steps = place.experiment.train, list_steps(place.train, at_most)
    # A checkpoint that an interruption left is kept while it is the newest; later it does not count for `train.keep`.
    ends = (train.steps, *steps[-1:])
    kept = [step for step in steps if step % train.checkpoint_every == 0 or step in ends][-train.keep :]
    old = [step for step in steps if step not in kept and not place.experiment.keeps_checkpoint(step)]
    try:
        used = list_used_steps(place) if old else set()
    except (PipelineError, KeyError, TypeError) as error:
        logger.warning("%s; until that is repaired, no checkpoint is deleted", error)
        return
    for step in old:
        if step in train.keep_steps:
            _delete_state(place.locate_step(step))
        elif step not in used:
            files.delete_folder(place.locate_step(step))


def _delete_state(directory: Path) -> None:
    """Delete all of a checkpoint except the EMA. If interrupted, it is whole, or lacks `.sealed.json` only."""
    if not (directory / STATE).exists():
        return
    with suppress(PipelineError):  # a damaged one stays as it is: nobody resumes from it
        meta = read_meta(directory)
        listed = {EMA: meta["files"][EMA]}
        (directory / files.SEALED).unlink(missing_ok=True)
        files.write_json(directory / META, {**meta, "files": listed})
        (directory / STATE).unlink()
        files.note_times(directory / META, listed)


def list_used_steps(run: Place) -> set[int]:
    """Return the steps whose checkpoints a sample set (even an unfinished one), a score or a selection uses."""
    found = [*find_sample_facts(run.path), *find_scores(run.path)]
    steps = {files.read_json(file, dict[str, Any])["protocol"]["checkpoint"] for file in found}
    selected = [files.read_json(file, dict[str, Any])["scores"] for file in find_selections(run.path)]
    return steps | {score["step"] for scores in selected for score in scores}


def name_weights_file(which: str, number: int = 0) -> str:
    """Return the file of a checkpoint that holds the `raw` weights, or the `ema` of this number."""
    return EMA if which == "ema" and number == 0 else STATE


def load_weights(directory: Path, which: str, number: int = 0) -> Tensors:
    """Return the network's tensors, `raw` or the `ema` of this number. Raises PipelineError if they are broken."""
    if name_weights_file(which, number) == EMA:
        verify_checkpoint(directory)
        return load_file(directory / EMA)
    state, prefix = load_checkpoint(directory), "net." if which == "raw" else f"ema.{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def describe_model(experiment: Experiment) -> dict[str, Any]:
    """Return the settings of a run's model as plain values, the first argument of `ddpm.build_model`."""
    names = {"label", "guidance_scale", *signature(run_image_chains).parameters}
    options = {name: value for name, value in vars(experiment.sample).items() if name in names}
    return {
        "diffusion": asdict(experiment.diffusion), "model": asdict(cast(Any, experiment.model)),
        "shape": list(experiment.data.shape), "num_classes": experiment.num_classes,
        "options": {**options, "seed": experiment.seed}, "source": experiment.name,
    }  # fmt: skip


def create_network(experiment: Experiment, device: torch.device | str = "cpu") -> nn.Module:
    data = experiment.data
    return model.create_network(
        experiment.model, Diffusion(experiment.diffusion), data.shape, experiment.num_classes, device,
        seed=experiment.seed, known_images=data.limit or 0,
    )  # fmt: skip


def read_model(place: Place) -> tuple[dict[str, Any], Tensors]:
    """Read the settings and the weights of the selected checkpoint. Raises PipelineError if there is none."""
    step, experiment = place.experiment.checkpoint_step, place.experiment
    if not place.locate_step(step).is_dir():
        raise_no_checkpoint(place, f"of step {step}")
    verify_step(place, step, "seal")
    weights = load_weights(place.locate_step(step), experiment.sample.weights, experiment.ema_number)
    source = f"{experiment.weights_kind} weights of step {step} of {place.name}"
    return {**describe_model(experiment), "source": source}, weights


@lru_cache(maxsize=1)
def load_model(
    place: Place, device: torch.device, precision: Precision = "fp32", compiled: bool = False, graph: bool = False
) -> model.Model:  # fmt: skip
    """Load the model of the selected checkpoint; cached, since one process runs many units.

    graph: let a GPU record the network's calls.
    """
    found = model.build_model(*read_model(place), device)
    net = cast(nn.Module, torch.compile(found.net)) if compiled else found.net
    return replace(found, net=prepare_network(net, precision, device, graph))
