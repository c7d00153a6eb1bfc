"""The diffusers layout: published weights in, our own out.

A folder holds config.json with the network's settings beside diffusion_pytorch_model.safetensors or .bin, at
its root or under unet/; scheduler_config.json, at the root or under scheduler/, holds the diffusion's.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpm import schedules
from ddpm.config import LEARNED, DiffusionConfig
from ddpm.diffusion import Diffusion
from pipeline.config import Experiment, load_experiment
from pipeline.errors import ConfigError, PipelineError
from pipeline.store import checkpoint
from pipeline.store.files import atomic_directory, read_json, write_json
from pipeline.store.run import Place

Tensors = dict[str, torch.Tensor]

NETWORK, SCHEDULER, PIPELINE = "config.json", "scheduler_config.json", "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYOUT_VERSION = "0.30.0"  # of diffusers, whose names of settings these are

# What the settings of diffusers' UNet2DModel must be to mean the paper's network, and what leaving one out means.
FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "attention_head_dim": None,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-6,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
LEFT_OUT = FIXED | {
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "downsample_padding": 1,
    "attention_head_dim": 8,
    "norm_eps": 1e-5,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "in_channels": 3,
    "out_channels": 3,
}
SHAPE = (
    "sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups",
    "down_block_types", "up_block_types",
)  # fmt: skip
UNREAD = ("dropout", "num_train_timesteps")  # neither changes what a trained network computes

SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample"}
VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small", "learned_range": "learned_range"}

RENAMES = [  # from our names of tensors to those of diffusers
    (r"^time_mlp\.0\.", "time_embedding.linear_1."),
    (r"^time_mlp\.2\.", "time_embedding.linear_2."),
    (r"^(down|up)\.", r"\1_blocks."),
    (r"^middle\.block1\.", "mid_block.resnets.0."),
    (r"^middle\.block2\.", "mid_block.resnets.1."),
    (r"^middle\.attention\.", "mid_block.attentions.0."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"\.blocks\.", ".resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.time_proj\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.norm\.", ".group_norm."),
    (r"\.([qkv])\.", r".to_\1."),
    (r"\.proj_out\.", ".to_out.0."),
]
OLDER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_name(name: str) -> str:
    """What diffusers calls our tensor `name`."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


# In


def import_weights(experiment: Experiment, run: Place) -> None:
    """Make the published weights the checkpoint of step `train.steps`, as which every stage reads them.

    Raises ConfigError where the published settings are not the experiment's, PipelineError where the tensors
    are not the network's.
    """
    tensors = read(experiment)
    state = {f"net.{name}": tensor for name, tensor in tensors.items()}
    step = experiment.train.steps
    checkpoint.save(run.step_folder(step), state, tensors, step)


def read(experiment: Experiment) -> Tensors:
    """The tensors at `published.path`, float32, under our names. Raises as `import_weights` does."""
    file = experiment.published.file
    assert file is not None, "the experiment trains its own weights"
    faults = _network_faults(experiment, _json(file.parent / NETWORK))
    faults += _scheduler_faults(experiment.diffusion, _scheduler_beside(file))
    if faults:
        raise ConfigError([f"{file.parent}: {fault}" for fault in faults])
    wanted = checkpoint.new_network(experiment, "meta").state_dict()
    return _fitted(wanted, _load_tensors(file), file)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PipelineError(f"{path} is missing; the weights beside it cannot be understood without it")
    return read_json(path)


def _scheduler_beside(file: Path) -> dict[str, Any]:
    """The published diffusion, or nothing: some publish the network alone."""
    root = file.parent.parent if file.parent.name == "unet" else file.parent
    places = (root / "scheduler" / SCHEDULER, root / SCHEDULER)
    return next((read_json(path) for path in places if path.is_file()), {})


def _load_tensors(file: Path) -> Tensors:
    """All tensors of the file under diffusers' newer names, float32. A pickle that holds more is refused."""
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = (str(error).strip() or "it is empty").splitlines()[0]
        raise PipelineError(
            f"{file} is broken or holds more than tensors, and was not opened: {reason}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise PipelineError(f"{file} holds no plain table of tensors; it is not in the diffusers layout")
    return {_newer_name(name): tensor.float() for name, tensor in found.items()}


def _newer_name(name: str) -> str:
    return re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: f".{OLDER_NAMES[match[1]]}.", name)


def _fitted(wanted: Tensors, given: Tensors, file: Path) -> Tensors:
    """`given` under our names and in our shapes; raises PipelineError saying which tensors differ."""
    theirs = {name: diffusers_name(name) for name in wanted}
    faults = {
        "missing": [name for name in theirs.values() if name not in given],
        "unexpected": sorted(given.keys() - set(theirs.values())),
        "of another shape": [
            f"{name} is {tuple(given[name].shape)}, not {tuple(wanted[own].shape)}"
            for own, name in theirs.items()
            if name in given and _bare(given[name]) != _bare(wanted[own])
        ],
    }
    told = [
        f"{len(names)} {fault} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if told:
        raise PipelineError(f"{file} holds another network than its settings say: {'; '.join(told)}")
    return {own: given[name].reshape(wanted[own].shape) for own, name in theirs.items()}


def _bare(tensor: torch.Tensor) -> list[int]:
    """The shape without trailing ones: a 1x1 convolution is a linear map over channels."""
    shape = list(tensor.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return shape


def _network_faults(experiment: Experiment, published: dict[str, Any]) -> list[str]:
    """What the published settings ask for that our network has not, or that the experiment has otherwise."""
    _refuse_other_networks(experiment)
    given = LEFT_OUT | {name: value for name, value in published.items() if not name.startswith("_")}
    known = {*FIXED, *SHAPE, *UNREAD}
    faults = [
        f"{name} is {given[name]!r}, and this network has {value!r}"
        for name, value in FIXED.items()
        if given[name] != value
    ]
    faults += [f"{name}={given[name]!r} is a setting not known here" for name in given if name not in known]
    missing = [name for name in SHAPE if given.get(name) is None]
    if missing:
        return [*faults, f"{NETWORK} does not say {', '.join(missing)}"]
    return faults + _shape_faults(experiment, given)


def _shape_faults(experiment: Experiment, given: dict[str, Any]) -> list[str]:
    """Settings of the experiment that are not the published network's, each with the override that is."""
    widths, attended = given["block_out_channels"], ["Attn" in kind for kind in given["down_block_types"]]
    size, own = given["sample_size"], network_settings(experiment)
    if not isinstance(size, int):
        return [f"sample_size is {size!r}; images are squares, with one side"]
    if any(width % widths[0] for width in widths):
        return [f"block_out_channels is {widths}; every width must be a multiple of the first"]
    overrides = {
        "sample_size": f"data.image_size={size}",
        "in_channels": f"data.channels={given['in_channels']}",
        "block_out_channels": f"model.channels={widths[0]} "
        f"model.channel_mult={_listed(width // widths[0] for width in widths)}",
        "layers_per_block": f"model.num_res_blocks={given['layers_per_block']}",
        "norm_num_groups": f"model.norm_groups={given['norm_num_groups']}",
        "down_block_types": "model.attention_resolutions="
        + _listed(size >> level for level, attends in enumerate(attended) if attends),
    }
    faults = [
        f"{name} is {given[name]!r}, the experiment's {own[name]!r}; set {override}"
        for name, override in overrides.items()
        if given[name] != own[name]
    ]
    mirrored = [kind.replace("Down", "Up") for kind in reversed(given["down_block_types"])]
    if given["up_block_types"] != mirrored:
        faults.append(f"up_block_types is {given['up_block_types']}, and this network has {mirrored}")
    if given["out_channels"] != own["out_channels"]:
        faults.append(
            f"out_channels is {given['out_channels']}, the experiment's {own['out_channels']}; a learned "
            "diffusion.variance has twice the image's channels, a fixed one as many"
        )
    return faults


def _listed(numbers: Any) -> str:
    return f"[{','.join(map(str, numbers))}]"


def _scheduler_faults(diffusion: DiffusionConfig, given: dict[str, Any]) -> list[str]:
    """How the published diffusion differs from the experiment's; how it is sampled is free."""
    if not given:
        return []
    faults = []
    predicts = given.get("prediction_type", "epsilon")
    if predicts != PREDICTIONS.get(diffusion.predict):
        faults.append(
            f"prediction_type is {predicts!r}, the experiment has diffusion.predict={diffusion.predict}"
        )
    theirs, ours = _published_betas(given), Diffusion(diffusion).tables["beta"]
    if theirs is None or given.get("rescale_betas_zero_snr"):
        faults.append(f"its beta schedule ({given.get('beta_schedule')}, maybe rescaled) is none of ours")
    elif len(theirs) != len(ours):
        faults.append(f"it has {len(theirs)} timesteps, the experiment diffusion.timesteps={len(ours)}")
    elif not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-8):
        faults.append(
            f"its betas ({_span(theirs)}) are not those of diffusion.beta_schedule="
            f"{diffusion.beta_schedule} ({_span(ours)})"
        )
    return faults


def _published_betas(given: dict[str, Any]) -> torch.Tensor | None:
    """Every beta of a scheduler's settings, float64; None for a schedule that we do not have."""
    if given.get("trained_betas") is not None:
        return torch.tensor(given["trained_betas"], dtype=torch.float64)
    names = {theirs: own for own, theirs in SCHEDULES.items()}
    name = names.get(given.get("beta_schedule", "linear"))
    if name is None:
        return None
    ends = given.get("beta_start", 1e-4), given.get("beta_end", 0.02)
    return schedules.betas(name, given.get("num_train_timesteps", 1000), *ends)


def _span(betas: torch.Tensor) -> str:
    middle = len(betas) // 2
    return ", ".join(f"{float(betas[i]):.3g}" for i in (0, middle, -1))


# Out


def export(path: Path, directory: Path, which: str, step: int | None) -> str:
    """Write the weights of the run directory `path` so that diffusers' DDPMPipeline loads `directory`.

    which: `ema` or `raw`; step None = the newest checkpoint. Returns what was written, in a line.
    """
    experiment = load_experiment(str(path / "experiment.yaml"), [])
    scheduler, settings = scheduler_settings(experiment), network_settings(experiment)
    steps = checkpoint.steps_on_disk(path / "train")
    if not steps or (step is not None and step not in steps):
        known = ", ".join(map(str, steps)) or "none"
        raise PipelineError(f"{path} has no checkpoint of step {step or 'any'} (there are: {known})")
    step = step or steps[-1]
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise PipelineError(f"{directory} exists and is not empty; name a new folder to export to")
    tensors = checkpoint.weights(_step_dir(path, experiment, step), which)
    kind = experiment.published.weights or which
    facts = {"format": "pt", "run": path.name, "step": str(step), "weights": kind}
    header = {"_diffusers_version": LAYOUT_VERSION}
    with atomic_directory(directory) as temporary:
        for folder in ("unet", "scheduler"):
            (temporary / folder).mkdir()
        save_file(_exported(tensors), temporary / "unet" / WEIGHTS, facts)
        write_json(temporary / "unet" / NETWORK, header | {"_class_name": "UNet2DModel"} | settings)
        write_json(temporary / "scheduler" / SCHEDULER, header | {"_class_name": "DDPMScheduler"} | scheduler)
        parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
        write_json(temporary / PIPELINE, header | {"_class_name": "DDPMPipeline"} | parts)
    return f"{directory}: {kind} weights of step {step} of {path.name}"


def _step_dir(path: Path, experiment: Experiment, step: int) -> Path:
    """Needs neither the images nor their key, so a run can be exported where its data is not."""
    key = path.name.removeprefix(f"{experiment.name}-")
    return Place(path.parent, experiment, "", key).step_folder(step)


def _exported(tensors: Tensors) -> Tensors:
    return {diffusers_name(name): tensor.contiguous() for name, tensor in tensors.items()}


def _refuse_other_networks(experiment: Experiment) -> None:
    model = experiment.model
    if model.name != "unet":
        raise PipelineError(
            f"model.name={model.name} has no place in the diffusers layout; only unet has one"
        )
    if model.resample != "conv":
        raise PipelineError(
            f"model.resample={model.resample} has no place in the diffusers layout; only conv has one"
        )


def network_settings(experiment: Experiment) -> dict[str, Any]:
    """The settings of diffusers' UNet2DModel that make it our network."""
    _refuse_other_networks(experiment)
    data, model = experiment.data, experiment.model
    attended = [side in model.attention_resolutions for side in model.resolutions(data.image_size)]
    return FIXED | {
        "sample_size": data.image_size,
        "in_channels": data.channels,
        "out_channels": Diffusion(experiment.diffusion).out_channels(data.channels),
        "block_out_channels": list(model.widths),
        "layers_per_block": model.num_res_blocks,
        "norm_num_groups": model.norm_groups,
        "dropout": model.dropout,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attended],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attended)],
    }


def scheduler_settings(experiment: Experiment) -> dict[str, Any]:
    """The settings of diffusers' DDPMScheduler that make it our ancestral sampler over all timesteps."""
    diffusion = experiment.diffusion
    learned = diffusion.variance in LEARNED
    variance = diffusion.variance if learned else experiment.sample.variance or diffusion.variance
    for key, value, known in (
        ("predict", diffusion.predict, PREDICTIONS),
        ("variance", variance, VARIANCES),
    ):
        if value not in known:
            raise PipelineError(f"diffusion.{key}={value} is nothing that diffusers' DDPMScheduler reverses")
    named = diffusion.beta_schedule in SCHEDULES
    return {
        "num_train_timesteps": diffusion.timesteps,
        "beta_schedule": SCHEDULES.get(diffusion.beta_schedule, "linear"),
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "trained_betas": None if named else Diffusion(diffusion).tables["beta"].tolist(),
        "variance_type": VARIANCES[variance],
        "prediction_type": PREDICTIONS[diffusion.predict],
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
