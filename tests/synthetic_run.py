"""A run directory as the stages leave it, made in milliseconds, for whoever reads run directories."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from image_files import noise, write_shards
from PIL import Image

from pipeline import config
from pipeline.config import Experiment
from pipeline.store import files as rundir
from pipeline.store import keys
from pipeline.store.run import Place

BEGAN = 1_700_000_000_000  # Unix milliseconds
load_experiment = cache(lambda name, overrides: config.load_experiment(name, list(overrides)))


def make_run(
    storage: Path, name: str = "digits", overrides: tuple[str, ...] = (), scores: bool = True
) -> Place:
    experiment = load_experiment(name, overrides)
    data_key = keys.make_data_key(experiment, "synthetic")
    run = Place(storage, experiment, data_key, keys.make_run_key(experiment, data_key))
    made_with = {
        "commit": "0123456789abcdef0123456789abcdef01234567", "versions": {"torch": "2.9", "ray": "2.50"},
        "data_key": run.data_key, "keys": keys.VERSION, "command": "ddpm run digits name=`a`", "host": "vm",
    }  # fmt: skip
    tree = config.to_dict(experiment) | {"made_with": made_with}
    rundir.write_text(run.experiment_yaml, yaml.safe_dump(tree, sort_keys=False))
    data = experiment.data
    images, facts = noise(8, data.image_size, data.image_size, data.channels), {"fingerprint": "synthetic"}
    write_shards(run.data, images, (8,), 0, ("train", "test"), **facts, labels=data.labels)
    write_log(run, 0, experiment.train.steps, experiment.train.log_every)
    for step in (experiment.train.steps - experiment.train.checkpoint_every, experiment.train.steps):
        write_checkpoint(run, step)
        write_grid(run.locate_grid(step), experiment)
    if scores:
        write_grid(run.samples_grid, experiment, 10)
        write_shards(run.samples, images, (8,), 0, ("samples",), ("grid.png",))
        write_scores(run.scores, experiment)
        captions = {"samples.png": "Samples (Fig. 13)", "progressive.png": "Progressive generation (Fig. 6)"}
        for figure in captions:
            write_grid(run.figures / figure, experiment)
        rundir.write_manifest(run.figures, list(captions), order=list(captions), captions=captions)
    return run


def write_log(run: Place, start: int, stop: int, every: int) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(start)
    with run.log.open("a") as file:
        for step in range(start + every, stop + 1, every):
            metrics = {
                "train/loss": 0.03 + math.exp(-step / 150) + 0.004 * noise.standard_normal(),
                "train/grad_norm": 0.2 + 2 * math.exp(-step / 100),
                "train/lr": 1e-3 * min(1.0, step / 200),
                "train/images_per_second": 1500 + 40 * noise.standard_normal(),
            }
            file.write(json.dumps({"step": step, "time": BEGAN + 85 * step, "metrics": metrics}) + "\n")


def write_checkpoint(run: Place, step: int) -> None:
    files = {name: {"bytes": 1, "sha256": "ab" * 32} for name in ("ema.safetensors", "state.safetensors")}
    rundir.write_json(run.locate_step(step) / "meta.json", {"step": step, "files": files})


def write_grid(path: Path, experiment: Experiment, side: int = 8) -> None:
    data = experiment.data
    pixels = np.random.default_rng(3).integers(0, 256, (side * data.image_size,) * 2 + (3,), dtype=np.uint8)
    with rundir.write_atomically(path) as temporary:
        Image.fromarray(pixels if data.channels == 3 else pixels[..., 0]).save(temporary, format="PNG")


def write_scores(folder: Path, experiment: Experiment, **changed: Any) -> None:
    steps = experiment.diffusion.timesteps
    t = np.arange(steps)
    terms = 1.8 * np.exp(-t / 1.3) + 0.012 * np.exp(-t / 120)
    mse = (0.01 + 0.5 * (t / steps) ** 1.2) ** 2
    rates = np.append(terms[::-1].cumsum()[:-1][::-1], 0)  # of the terms after each
    table = [
        {"k": k, "rate_bpd": float(rates[steps - k]), "rmse": float(127.5 * math.sqrt(mse[steps - k]))}
        for k in range(1, steps + 1)
    ]
    scores = {
        "fid": 14.21, "is_mean": 9.02, "is_std": 0.21, "nll_bpd": 4.52, "rate_bpd": 2.4, "distortion_bpd": 2.1,
    }  # fmt: skip
    protocol = {
        "n": experiment.sample.num_images, "comparable": False, "weights": "ema", "sampler": "ancestral",
        "steps": steps, "variance": "fixedlarge", "reference": "train", "rounding": "round",
        "extractor": "classifier-0a1b2c3d", "checkpoint": experiment.train.steps, "decoder": "tanh",
        "nll_images": 100, "test_images": 360, "splits": 10,
        "why_not": ["n = 512 images, the paper has 50,000", "features are not Inception's"],
    }  # fmt: skip
    points = {
        "test": {"fid": 31.0, "is_mean": 9.3, "is_std": 0.3, "n": 360},
        "gaussian": {"fid": 96.4, "is_mean": 3.1, "n": 512},
        "noise": {"fid": 2288.0, "is_mean": 1.2, "n": 512},
    }
    shares = [0.09, 0.11, 0.1, 0.12, 0.08, 0.1, 0.1, 0.09, 0.13, 0.08]
    metrics = {"scores": scores, "protocol": protocol, "reference_points": points, "class_shares": shares}
    rundir.write_json(folder / "metrics.json", metrics | changed)
    nll = {"terms": terms.tolist(), "mse": mse.tolist(), "prior": 7.4e-6, "n": 100, "rate_distortion": table}
    rundir.write_json(folder / "nll.json", nll)
    rundir.write_manifest(folder, ["metrics.json", "nll.json"])
