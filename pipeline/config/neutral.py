"""Settings at neutral values, which no key contains, so that a new option changes no key of an old run.

Give a new option the value of the old behaviour: in NEUTRAL, or in UNHASHED if no value of it changes a result. No key
contains that value, and a file that was written before the option means it.
"""

from collections.abc import Collection, Mapping

from pipeline.config.checks import Tree, to_dict

NEUTRAL: Tree = {
    "data.labels": 0,
    "data.test_images": 0,
    "data.background": None,
    "data.image_column": None,
    "data.limit": None,
    "diffusion.betas": [],
    "diffusion.t_sampling": "uniform",
    "model.fused": False,
    "model.class_conditional": False,
    "train.grad_clip": None,
    "train.lr_decay": "none",
    "train.ema_warmup": False,
    "train.label_dropout": 0.0,
    "train.keep_steps": [],
    "train.checkpoint_minutes": None,
    "published.path": None,
    "published.weights": None,
    "sample.steps": None,
    "sample.spacing": "uniform",
    "sample.variance": None,
    "sample.ema_decay": None,
    "sample.label": None,
    "sample.guidance_scale": 1.0,
    "sample.first_index": 0,
    "evaluate.extractor_weights": None,
    "evaluate.nll_split": "test",
    "evaluate.nll_images": None,
    "evaluate.nll_timesteps": None,
    "evaluate.variance": None,
}

# These move a number by the order of its sums at most: no key hashes them.
UNHASHED: Tree = {
    "model.recompute": 0,
    "train.accumulate": 1,
    "train.compile": False,
    "train.graph": False,
    "train.deterministic": False,
    "sample.compile": False,
    "sample.graph": False,
    "evaluate.compile": False,
    "evaluate.graph": False,
}

# Versions of corrected formulas, by the setting that uses one: a value of a key, or any value that is not zero.
# Version 1 is left out of the key.
FORMULAS = {
    "diffusion.variance=learned_range": 2,  # the upper end at t = 0 is log beta_1; it was log beta~_2
    "model.name=context_unet": 2,  # the network of its document; it was a similar one
    "model.name=mha_unet": 2,  # as context_unet
    "model.dropout": 2,  # a mask depends on its image alone; it depended on how the batch was cut
}


def get_key_content(name: str, section: object) -> Tree:
    """Return the values of section `name` that are hashed into keys, as plain containers."""
    content: Tree = {}
    for key, value in to_dict(section).items():
        full = f"{name}.{key}"
        if full not in UNHASHED and not (full in NEUTRAL and value == NEUTRAL[full]):
            content[key] = value
        if (version := FORMULAS.get(f"{full}={value}", FORMULAS.get(full, 1) if value else 1)) > 1:
            content[f"{key}.formula"] = version
    return content


def add_neutral_values(tree: Tree, keys: Mapping[str, Collection[str]]) -> None:
    """Add the options that did not exist when the file was written, at their neutral values.

    `keys`: those of each section. A section that is missing is added if all its keys have a neutral value.
    """
    neutral: dict[str, Tree] = {}
    for full, value in (NEUTRAL | UNHASHED).items():
        section, _, key = full.partition(".")
        neutral.setdefault(section, {})[key] = value
    for section, section_values in neutral.items():
        values = {key: value for key, value in section_values.items() if key in keys.get(section, ())}
        complete = section in keys and values.keys() >= set(keys[section])
        found = tree.get(section, {} if complete else None)
        if isinstance(found, dict):
            tree[section] = {**values, **found}
