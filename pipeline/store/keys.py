"""Keys hash content, never place: equal keys mean equal numbers, wherever the files lie."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.load import to_dict
from pipeline.config.sections import Experiment, checkpoint_rule, checkpoint_step
from pipeline.config.variants import candidate
from pipeline.store.run import sha256_of

# Which other evaluations are made beside this one says nothing about this one.
_NOT_IN_SCORE_KEY = {"checkpoints", "checkpoint_images"}
# What may change without making another run: how far it goes, and what is kept or shown on the way.
_NOT_IN_RUN_KEY = {"checkpoint_every", "sample_every", "log_every", "keep", "keep_every"}


def hash_of(content: Any) -> str:
    """12 hex digits of the sha256 over canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def data_key(experiment: Experiment, fingerprint: str) -> str:
    data = experiment.data
    return hash_of([fingerprint, data.image_size, data.channels, data.labels, data.test_images])


def run_content(experiment: Experiment) -> dict[str, Any]:
    """What the run key hashes beside the data: also the parameters that a tracking server is told.

    Published weights take the place of training: their content counts, and no setting of `train` does.
    """
    dropped = _NOT_IN_RUN_KEY if experiment.train.lr_decay != "none" else _NOT_IN_RUN_KEY | {"steps"}
    tree = to_dict(experiment)
    always = {"seed": tree["seed"], "diffusion": tree["diffusion"], "model": tree["model"]}
    file, weights = experiment.published.file, experiment.published.weights
    if file is not None:
        return always | {"published": {"sha256": sha256_of(file), "weights": weights}}
    train = {key: value for key, value in tree["train"].items() if key not in dropped}
    return always | {"train": train}


def run_key(experiment: Experiment, data_key: str) -> str:
    return hash_of([data_key, run_content(experiment)])


def sample_key(experiment: Experiment, run_key: str) -> str:
    """`num_images` is left out: asking for more images adds units."""
    sampler = to_dict(experiment.sample)
    del sampler["num_images"], sampler["checkpoint"]
    return hash_of([run_key, checkpoint_step(experiment), sampler])


def evaluate_key(experiment: Experiment, run_key: str) -> str:
    """A checkpoint that was chosen by its score has another protocol than one that was asked for."""
    evaluate = {k: v for k, v in to_dict(experiment.evaluate).items() if k not in _NOT_IN_SCORE_KEY}
    weights = evaluate["extractor_weights"]
    evaluate["extractor_weights"] = _content_of(Path(weights)) if weights else None
    file = experiment.evaluate.reference_file
    if file is not None:
        evaluate["reference"] = _content_of(file)
    drawn = [sample_key(experiment, run_key), experiment.sample.num_images, checkpoint_rule(experiment)]
    return hash_of([*drawn, evaluate])


def selection_key(experiment: Experiment, run_key: str) -> str:
    """More checkpoints of the same kind belong to the same selection."""
    return hash_of([evaluate_key(candidate(experiment, 0), run_key), experiment.evaluate.checkpoints])


def _content_of(path: Path) -> str:
    """Read once while it stays as it is: keys of many checkpoints, asked again and again, name the same file."""
    facts = path.stat()
    return _content_of_version(path, facts.st_size, facts.st_mtime_ns)


@lru_cache
def _content_of_version(path: Path, size: int, modified: int) -> str:
    return sha256_of(path)


def figures_key(experiment: Experiment, run_key: str) -> str:
    """Figures show samples, and what the evaluation found about them."""
    return hash_of([evaluate_key(experiment, run_key), to_dict(experiment.figures)])
