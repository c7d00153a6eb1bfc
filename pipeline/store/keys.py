"""Keys: hashes of content, without paths, so equal keys mean equal numbers.

A key leaves out what cannot change its content: here whole settings, in `pipeline.config.neutral` single values.
VERSION counts the rules of this module: runs of an earlier version have other keys.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config import Experiment, to_dict
from pipeline.config.neutral import get_key_content
from pipeline.store.files import hash_file
from pipeline.store.weight_files import find_weight_files

VERSION = 2

# How many images are asked for, and which other evaluations are made, does not change these samples or this score.
_NOT_IN_SAMPLE_KEY = {"num_images", "checkpoint"}
_NOT_IN_SCORE_KEY = {"checkpoints", "checkpoint_images"}
# What may change without making another run: how far it goes, and what is kept or shown on the way.
_NOT_IN_RUN_KEY = {
    "checkpoint_every", "checkpoint_minutes", "sample_every", "log_every", "keep", "keep_every", "keep_steps",
}  # fmt: skip


def hash_content(content: Any) -> str:
    """Return 12 hex digits of the sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def make_data_key(experiment: Experiment, fingerprint: str) -> str:
    """Return the key of the shards: the source's content, and the shape of its images."""
    data = get_key_content("data", experiment.data)
    shape = ("image_size", "channels", "labels", "test_images", "background", "image_column", "limit")
    return hash_content([fingerprint, {key: data[key] for key in shape if key in data}])


def collect_run_settings(experiment: Experiment, whole: bool = False) -> dict[str, Any]:
    """Return the settings that are hashed into the run key, without the data; `whole`: also those in no key.

    Published weights take the place of training: their content counts, and no setting of `train` does.
    """
    dropped = _NOT_IN_RUN_KEY if experiment.train.lr_decay != "none" else _NOT_IN_RUN_KEY | {"steps"}

    def content(name: str, section: Any) -> dict[str, Any]:
        return to_dict(section) if whole else get_key_content(name, section)

    always: dict[str, Any] = {
        "seed": experiment.seed,
        "diffusion": content("diffusion", experiment.diffusion),
        "model": content("model", experiment.model),
    }
    if files := find_weight_files(experiment.published):
        hashes = [_hash_file_once(file) for file in files]
        sha256 = hashes[0] if len(hashes) == 1 else hash_content(hashes)
        always["model"].pop("dropout.formula", None)  # nothing is trained, so nothing is dropped
        return always | {"published": {"sha256": sha256, "weights": experiment.published.weights}}
    train = content("train", experiment.train)
    return always | {"train": {key: value for key, value in train.items() if key not in dropped}}


def make_run_key(experiment: Experiment, data_key: str) -> str:
    """Return the key of a run: the data, the network, and all that moves its weights."""
    return hash_content([data_key, collect_run_settings(experiment)])


def make_sample_key(experiment: Experiment, run_key: str) -> str:
    """Return the key of a sample set: weights and sampler. Asking for more images adds units to it."""
    sampler = get_key_content("sample", experiment.sample)
    content = {key: value for key, value in sampler.items() if key not in _NOT_IN_SAMPLE_KEY}
    return hash_content([run_key, experiment.checkpoint_step, content])


def make_score_key(experiment: Experiment, run_key: str) -> str:
    """Return the key of a set of scores; the rule of selection is part of it."""
    evaluate = get_key_content("evaluate", experiment.evaluate)
    content = {key: value for key, value in evaluate.items() if key not in _NOT_IN_SCORE_KEY}
    if experiment.evaluate.extractor_weights:
        content["extractor_weights"] = _hash_file_once(Path(experiment.evaluate.extractor_weights))
    if experiment.evaluate.reference_file is not None:
        content["reference"] = _hash_file_once(experiment.evaluate.reference_file)
    drawn = [make_sample_key(experiment, run_key), experiment.sample.num_images, experiment.checkpoint_rule]
    return hash_content([*drawn, content])


def make_selection_key(experiment: Experiment, run_key: str) -> str:
    """Return the key of a selection. More checkpoints of the same kind belong to the same selection."""
    score_key = make_score_key(experiment.make_candidate(0), run_key)
    return hash_content([score_key, experiment.evaluate.checkpoints])


def make_figures_key(experiment: Experiment, run_key: str) -> str:
    """Return the key of a set of figures, which show samples and their scores."""
    return hash_content([make_score_key(experiment, run_key), get_key_content("figures", experiment.figures)])


def _hash_file_once(path: Path) -> str:
    """Hash a file, again only if it has changed: keys of many runs and checkpoints need the same file."""
    facts = path.stat()
    return _hash_version(path, facts.st_size, facts.st_mtime_ns)


@lru_cache
def _hash_version(path: Path, size: int, modified: int) -> str:
    return hash_file(path)
