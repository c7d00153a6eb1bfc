"""Import and export of weights in the layout of diffusers.

A folder holds config.json with the network's settings beside diffusion_pytorch_model.safetensors or .bin, at
its root or under unet/; scheduler_config.json, at the root or under scheduler/, holds the diffusion's.
"""

import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from ddpm import schedules
from ddpm.config import LEARNED, DiffusionConfig
from ddpm.diffusion import Diffusion
from ddpm.networks.config import UNetConfig
from ddpm.training import describe_mismatch
from pipeline.config import Experiment, PublishedConfig, load_experiment
from pipeline.errors import ConfigError, PipelineError
from pipeline.store import checkpoint
from pipeline.store.files import read_json, write_atomically, write_json
from pipeline.store.run import Place, list_steps
from pipeline.store.tensors import Tensors, load_tensors, read_header, save_tensors
from pipeline.store.weight_files import find_weight_files

Settings = dict[str, Any]  # as diffusers keeps them in JSON

NETWORK, SCHEDULER, PIPELINE = "config.json", "scheduler_config.json", "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LONGEST = 1_000_000  # timesteps of a chain that is looked at
FETCH = "fetch it again in the diffusers layout"
LAYOUT_VERSION = "0.42.1"  # of diffusers, whose names of settings these are

# What the settings of diffusers' UNet2DModel must be to mean the paper's network ...
FIXED: Settings = {
    "center_input_sample": False, "time_embedding_type": "positional", "time_embedding_dim": None,
    "freq_shift": 1, "flip_sin_to_cos": False, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1,
    "downsample_padding": 0, "downsample_type": "conv", "upsample_type": "conv", "act_fn": "silu",
    "attention_head_dim": None, "attn_norm_num_groups": None, "norm_eps": 1e-6, "resnet_time_scale_shift": "default",
    "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
}  # fmt: skip
# ... and what leaving one out means.
DEFAULTS = FIXED | {
    "freq_shift": 0, "flip_sin_to_cos": True, "downsample_padding": 1, "attention_head_dim": 8, "norm_eps": 1e-5,
    "layers_per_block": 2, "norm_num_groups": 32, "in_channels": 3, "out_channels": 3,
}  # fmt: skip
EMA_SETTINGS = {  # that diffusers' EMAModel writes beside those of the network
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
UNREAD = ("dropout", "num_train_timesteps")  # neither changes what a trained network computes

REMEDIES = {
    "sample_size": "; images are squares, with one side",
    "block_out_channels": "; every width must be a multiple of the first",
    "out_channels": "; a learned diffusion.variance has twice the image's channels, a fixed one as many",
}

SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small", "learned_range": "learned_range"}

RENAMES = [  # from our names of tensors to those of diffusers
    (r"^time_mlp\.0\.", "time_embedding.linear_1."), (r"^time_mlp\.2\.", "time_embedding.linear_2."),
    (r"^(down|up)\.", r"\1_blocks."), (r"^middle\.block1\.", "mid_block.resnets.0."),
    (r"^middle\.block2\.", "mid_block.resnets.1."), (r"^middle\.attention\.", "mid_block.attentions.0."),
    (r"^norm_out\.", "conv_norm_out."), (r"\.blocks\.", ".resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."), (r"\.time_proj\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."), (r"\.norm\.", ".group_norm."), (r"\.([qkv])\.", r".to_\1."),
    (r"\.proj_out\.", ".to_out.0."),
]  # fmt: skip
OLDER_NAMES = [  # of diffusers, to its present ones
    (r"\.query\.", ".to_q."), (r"\.key\.", ".to_k."), (r"\.value\.", ".to_v."), (r"\.proj_attn\.", ".to_out.0."),
]  # fmt: skip


def translate_name(name: str, renames: list[tuple[str, str]] = RENAMES) -> str:
    """Translate our name of a tensor into diffusers' name."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


# Import


def read_weights(experiment: Experiment) -> Tensors:
    """Read the tensors at `published.path`, float32, under our names.

    Raises ConfigError if the settings differ from the experiment's, PipelineError if the tensors do.
    """
    files = find_weight_files(experiment.published)
    assert files, "the experiment trains its own weights"
    file, folder = files[0], files[0].parent
    published = read_json(folder / NETWORK, Settings, FETCH)
    faults = find_network_differences(experiment, published)
    if scheduler := _read_scheduler(folder):
        faults += _find_scheduler_differences(experiment.diffusion, scheduler)
    kind, wanted_kind = read_header(file).get("weights"), experiment.published.weights
    kind = "ema" if folder.name == "unet_ema" or EMA_SETTINGS & published.keys() else kind
    if {kind, wanted_kind} == {"raw", "ema"}:
        faults.append(f"published.weights is {wanted_kind}, but the weights in this folder are {kind}")
    if faults:
        raise ConfigError([f"{folder}: {fault}" for fault in faults])
    read = {k: v for part in files for k, v in load_tensors(part, FETCH).items()}
    if broken := [name for name, tensor in read.items() if not tensor.isfinite().all()]:
        raise PipelineError(f"{file} holds values in {broken[0]} that are not finite; get other weights")
    given = {translate_name(name, OLDER_NAMES): tensor.float() for name, tensor in read.items()}
    own = checkpoint.create_network(experiment, "meta").state_dict()
    wanted = {translate_name(name): tensor for name, tensor in own.items()}
    for name in wanted.keys() & given.keys():  # a 1x1 convolution is a linear map over channels
        ours, theirs = wanted[name], given[name]
        if ours.shape[:2] == theirs.shape[:2] and ours.numel() == theirs.numel():
            given[name] = theirs.reshape(ours.shape)
    if fault := describe_mismatch(wanted, given):
        raise PipelineError(f"{file} holds another network than its settings say: {fault}")
    return {name: given[translate_name(name)] for name in own}


def find_network_differences(experiment: Experiment, published: Settings) -> list[str]:
    """Return the published settings that differ from the experiment or that we do not support."""
    own = make_network_settings(experiment)
    settings = {k: v for k, v in published.items() if k[0] != "_" and k not in EMA_SETTINGS}
    given = DEFAULTS | settings
    known = {*own, *UNREAD}
    faults = [f"{name}={given[name]!r} is a setting not known here" for name in given if name not in known]
    if missing := [name for name in own if name not in {*FIXED, *UNREAD} and given.get(name) is None]:
        return [*faults, f"{NETWORK} does not say {', '.join(missing)}"]
    if wrong := _find_type_problems(given):
        return [*faults, *wrong]
    remedies = REMEDIES | {name: f"; set {' '.join(words)}" for name, words in _find_overrides(given).items()}
    mirrored = [kind.replace("Down", "Up") for kind in reversed(given["down_block_types"])]
    if given["up_block_types"] == mirrored:
        del own["up_block_types"]  # the down blocks determine it
    return faults + [
        f"{name} is {given[name]!r}, the experiment's network has {value!r}{remedies.get(name, '')}"
        for name, value in own.items()
        if name not in UNREAD and given[name] != value
    ]


def derive_overrides(published: PublishedConfig) -> list[str]:
    """Return the overrides that make an experiment's network the published one, from config.json.

    None if that file or the weights cannot be read; `read_weights` raises the error.
    """
    try:
        given = DEFAULTS | read_json(find_weight_files(published)[0].with_name(NETWORK), Settings, FETCH)
    except (PipelineError, OSError):
        return []
    return [] if _find_type_problems(given) else list(chain.from_iterable(_find_overrides(given).values()))


def make_published_experiment(path: Path) -> Experiment:
    """Make an experiment whose network and diffusion are those of a folder. Raises ConfigError and PipelineError."""
    published = PublishedConfig(str(path), "ema" if (path / "unet_ema").is_dir() else "unknown")
    given = _read_scheduler(find_weight_files(published)[0].parent)
    own = {
        "timesteps": given.get("num_train_timesteps", 1000),
        "beta_schedule": _find_our_name(SCHEDULES, given.get("beta_schedule", "linear")),
        "beta_start": given.get("beta_start", 1e-4),
        "beta_end": given.get("beta_end", 0.02),
        "predict": _find_our_name(PREDICTIONS, given.get("prediction_type", "epsilon")),
        "variance": _find_our_name(VARIANCES, given.get("variance_type", "fixed_small")),
    }
    own["loss"] = "hybrid" if own["variance"] in LEARNED else "simple"
    if isinstance(betas := given.get("trained_betas"), list) and betas:
        own |= {"betas": betas, "timesteps": len(betas)}
    words = [f"diffusion.{key}={value}" for key, value in own.items()]
    words += [f"published.path={path}", f"published.weights={published.weights}"]
    return load_experiment("cifar10_published", [*derive_overrides(published), *words])


def _find_our_name(names: dict[str, str], theirs: object) -> object:
    """Return our name of a setting of diffusers; if there is none, diffusers' own, which the configuration refuses."""
    return {name: own for own, name in names.items()}.get(str(theirs), theirs)


def _read_scheduler(folder: Path) -> Settings:
    """Read the scheduler's settings of the weights in `folder`; empty if the network alone was published."""
    root = folder.parent if folder.name in ("unet", "unet_ema") else folder
    files = [path for path in (root / "scheduler" / SCHEDULER, root / SCHEDULER) if path.is_file()]
    return read_json(files[0], Settings, FETCH) if files else {}


def _find_type_problems(given: Settings) -> list[str]:
    """Return the settings of the network's shape whose type or size is wrong."""
    widths, halves = given.get("block_out_channels"), ("down_block_types", "up_block_types")
    wrong = [] if _is_list(widths, int) and min(widths or [0]) > 0 else ["block_out_channels"]
    wrong += [
        name for name in halves if not _is_list(given.get(name), str) or len(given[name]) != len(widths or [])
    ]
    numbers = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
    wrong += [name for name in numbers if type(given.get(name)) is not int or given[name] < 1]
    names = dict.fromkeys(wrong)
    return [f"{name} is {given.get(name)!r}, which is no setting of a network" for name in names]


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is kind for item in value)


def _find_overrides(given: Settings) -> dict[str, list[str]]:
    """Return the overrides that make the experiment match each of the published settings."""
    size, widths, kinds = given["sample_size"], given["block_out_channels"], given["down_block_types"]
    if not isinstance(size, int) or any(width % widths[0] for width in widths):
        return {}
    mults = ",".join(str(width // widths[0]) for width in widths)
    attended = ",".join(str(size >> level) for level, kind in enumerate(kinds) if "Attn" in kind)
    return {
        "sample_size": [f"data.image_size={size}"],
        "in_channels": [f"data.channels={given['in_channels']}"],
        "block_out_channels": [f"model.channels={widths[0]}", f"model.channel_mult=[{mults}]"],
        "layers_per_block": [f"model.num_res_blocks={given['layers_per_block']}"],
        "norm_num_groups": [f"model.norm_groups={given['norm_num_groups']}"],
        "down_block_types": [f"model.attention_resolutions=[{attended}]"],
    }


def _find_scheduler_differences(diffusion: DiffusionConfig, given: Settings) -> list[str]:
    """Return how the published diffusion differs from the experiment's; the sampler is not compared."""
    faults = []
    predicts = given.get("prediction_type", "epsilon")
    if predicts != PREDICTIONS.get(diffusion.predict):
        faults.append(f"prediction_type is {predicts!r}, ours is diffusion.predict={diffusion.predict}")
    theirs, ours = _compute_scheduler_betas(given), Diffusion(diffusion).tables["beta"]
    if theirs is None or given.get("rescale_betas_zero_snr"):
        faults.append(f"its beta schedule ({given.get('beta_schedule')}, maybe rescaled) is none of ours")
    elif len(theirs) != len(ours):
        faults.append(f"it has {len(theirs)} timesteps, the experiment diffusion.timesteps={len(ours)}")
    elif not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-8):
        worst = int((theirs - ours).abs().argmax())
        faults.append(
            f"its beta {worst + 1} is {theirs[worst]:.3g}; diffusion.beta_schedule={diffusion.beta_schedule} has "
            f"{ours[worst]:.3g}"
        )
    return faults


def _compute_scheduler_betas(given: Settings) -> torch.Tensor | None:
    """Compute all betas of a scheduler's settings, float64 (T,); None for a schedule that this program lacks."""
    steps = given.get("num_train_timesteps", 1000)
    ends = given.get("beta_start", 1e-4), given.get("beta_end", 0.02)
    are_numbers = all(type(beta) in (int, float) for beta in (*ends, *(given.get("trained_betas") or ())))
    if type(steps) is not int or not 1 < steps <= LONGEST or not are_numbers:
        return None
    if given.get("trained_betas") is not None:
        return torch.tensor(given["trained_betas"], dtype=torch.float64)
    names = {theirs: own for own, theirs in SCHEDULES.items()}
    name = names.get(given.get("beta_schedule", "linear"))
    if name is None:
        return None
    return schedules.compute_betas(name, steps, *ends)


# Export


def export_to_diffusers(
    place: Place, directory: Path, which: Literal["ema", "raw"], step: int | None
) -> tuple[Experiment, str]:
    """Write the weights of a run so that diffusers' DDPMPipeline loads `directory`.

    which: `ema` or `raw`; step None = the newest checkpoint. Returns the run's experiment with these weights as those
    that are sampled, and in words what was written.
    """
    experiment = place.experiment
    steps = list_steps(place.train)
    if not steps or (step is not None and step not in steps):
        checkpoint.raise_no_checkpoint(place, f"of step {step or 'any'}")
    sample = replace(experiment.sample, checkpoint=step or steps[-1], weights=which, ema_decay=None)
    exported = replace(experiment, sample=sample)
    settings, tensors = checkpoint.read_model(place.replace_experiment(exported))
    write_folder(exported, tensors, directory, exported.weights_kind, settings["source"])
    return exported, settings["source"]


def write_folder(experiment: Experiment, tensors: Tensors, directory: Path, kind: str, source: str) -> None:
    """Write weights of a kind so that diffusers' DDPMPipeline loads `directory`."""
    scheduler, network = make_scheduler_settings(experiment), make_network_settings(experiment)
    exported = {translate_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    header = {"_diffusers_version": LAYOUT_VERSION}
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    with write_atomically(directory, folder=True) as temporary:
        for folder in parts:
            (temporary / folder).mkdir()
        facts = {"format": "pt", "source": source, "weights": kind}
        save_tensors(exported, temporary / "unet" / WEIGHTS, facts)
        write_json(temporary / "unet" / NETWORK, header | {"_class_name": "UNet2DModel"} | network)
        write_json(temporary / "scheduler" / SCHEDULER, header | {"_class_name": "DDPMScheduler"} | scheduler)
        write_json(temporary / PIPELINE, header | {"_class_name": "DDPMPipeline"} | parts)


def make_network_settings(experiment: Experiment) -> Settings:
    data, model = experiment.data, experiment.model
    if not isinstance(model, UNetConfig):
        raise PipelineError(f"the diffusers layout has no model.name={model.name}, only unet")
    if model.class_conditional:
        raise PipelineError("the diffusers layout holds no model.class_conditional network of ours")
    if model.resample != "conv":
        raise PipelineError(f"the diffusers layout has no model.resample={model.resample}, only conv")
    attended = [side in model.attention_resolutions for side in model.list_sides(data.image_size)]
    return FIXED | {
        "sample_size": data.image_size, "in_channels": data.channels,
        "out_channels": Diffusion(experiment.diffusion).count_output_channels(data.channels),
        "block_out_channels": list(model.widths), "layers_per_block": model.num_res_blocks,
        "norm_num_groups": model.norm_groups, "dropout": model.dropout,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attended],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attended)],
    }  # fmt: skip


def make_scheduler_settings(experiment: Experiment) -> Settings:
    """Return diffusers' DDPMScheduler settings for our ancestral sampler over all timesteps."""
    diffusion = experiment.diffusion
    learned = diffusion.variance in LEARNED
    variance = diffusion.variance if learned else experiment.sample.variance or diffusion.variance
    for key, value, known in (("predict", diffusion.predict, PREDICTIONS), ("variance", variance, VARIANCES)):
        if value not in known:
            raise PipelineError(f"diffusion.{key}={value} is nothing that diffusers' DDPMScheduler reverses")
    named = diffusion.beta_schedule in SCHEDULES and not diffusion.betas
    return {
        "num_train_timesteps": diffusion.timesteps,
        "beta_schedule": SCHEDULES.get(diffusion.beta_schedule, "linear"), "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "trained_betas": None if named else Diffusion(diffusion).tables["beta"].tolist(),
        "variance_type": VARIANCES[variance], "prediction_type": PREDICTIONS[diffusion.predict],
        "clip_sample": True, "clip_sample_range": 1.0, "timestep_spacing": "leading", "steps_offset": 0,
    }  # fmt: skip
