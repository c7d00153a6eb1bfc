"""docs/results/short-runs.json and its picture, from the files that short runs left and from their networks.

python docs/results/short_runs.py RUN:STEP ...      the first one is what the others are compared with

Sample sets and scores are the program's own (`ddpm sample`, `ddpm evaluate`); here are counted the colours of the
images, and measured, on test images, the error of the network's estimate of x_0 by noise level: of all pixels, and of
the mean of each channel, which is the colour.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.rng import Stream, draw_normal
from pipeline.config import flatten, to_dict
from pipeline.drawing.grids import save_grid
from pipeline.engine.find import read_place
from pipeline.store import tars
from pipeline.store.checkpoint import load_model
from pipeline.store.files import read_json
from pipeline.store.run import Place

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
PICTURE = HERE.parent / "pictures" / "short-runs.png"
LEVELS = (1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 50, 20)  # the paper's t, from 1
IMAGES = 64  # of the test set, for the errors
SHOWN = 24  # samples of each set in the picture
RESAMPLES = 1000
CPU = torch.device("cpu")


def main(names: list[str]) -> None:
    places = [select_step(*name.rsplit(":", 1)) for name in names]
    data = places[0].data
    test = from_uint8(torch.from_numpy(tars.load_images(data, "test")[0]))
    train = from_uint8(torch.from_numpy(tars.load_images(data, "train", 0, 10_000)[0]))
    base = flatten(to_dict(places[0].experiment))
    found = {
        "test images": describe_colours(test),
        "errors": {"levels": LEVELS, "images": IMAGES, "linear": measure_linear_colour(train, test[:IMAGES])},
        "runs": [describe_run(place, base, test[:IMAGES]) for place in places],
    }
    (HERE / "short-runs.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_samples(places)


def select_step(path: str, step: str) -> Place:
    """Return the place of a run whose checkpoint is that of `step`."""
    place = read_place(Path(path).absolute())
    train = replace(place.experiment.train, steps=int(step))
    return place.replace_experiment(replace(place.experiment, train=train))


def describe_run(place: Place, base: dict[str, Any], test: Tensor) -> dict[str, Any]:
    """Return the settings of a run that differ from the first one's, its errors, its sample sets and its scores."""
    experiment, step = place.experiment, place.experiment.train.steps
    own = flatten(to_dict(experiment))
    ignored = ("name", "train.steps", "train.checkpoint_every")
    return {
        "name": experiment.name,
        "differs": {key: value for key, value in own.items() if base.get(key) != value and key not in ignored},
        "step": step,
        "images_seen": step * experiment.train.batch_size,
        "loss": [json.loads(line) for line in place.log.read_text().splitlines()],
        "errors": measure_errors(place, test),
        "sample_sets": [describe_set(file.parent) for file in list_sets(place)],
        "scores": [
            scores for file in sorted(place.path.glob("evaluation/*/metrics.json"))
            if (scores := read_json(file, dict[str, Any]))["protocol"]["checkpoint"] == step
        ],
    }  # fmt: skip


def list_sets(place: Place) -> list[Path]:
    """Return the manifests of the sample sets of this checkpoint."""
    step, files = place.experiment.train.steps, sorted(place.path.glob("samples/*/manifest.json"))
    return [file for file in files if read_json(file, dict[str, Any])["protocol"]["checkpoint"] == step]


def describe_set(folder: Path) -> dict[str, Any]:
    """Return the protocol of a sample set, and the colours of its images."""
    images = from_uint8(torch.from_numpy(tars.load_images(folder, "samples")[0]))
    return {
        "protocol": read_json(folder / "manifest.json", dict[str, Any])["protocol"],
        **describe_colours(images),
    }


def describe_colours(images: Tensor) -> dict[str, Any]:
    """Return what images (N, C, H, W) in [-1, 1] look like in numbers, each with its 95 % interval over the images.

    mean, spread: of the images' means, by channel; tint: root mean square of a channel's mean beside the image's;
    neighbours: mean difference of neighbouring pixels in a row; beyond: share of the values beyond 0.99.
    """
    means = images.mean(dim=(2, 3)).numpy()  # (N, C)
    rough = images.diff(dim=3).abs().mean(dim=(1, 2, 3)).numpy()
    beyond = (images.abs() > 0.99).float().mean(dim=(1, 2, 3)).numpy()

    def count(rows: np.ndarray) -> dict[str, np.ndarray]:
        own = means[rows]
        tint = own - own.mean(axis=1, keepdims=True)
        return {
            "mean": own.mean(axis=0), "spread": own.std(axis=0), "tint": np.sqrt((tint**2).mean()),
            "neighbours": rough[rows].mean(), "beyond": beyond[rows].mean(),
        }  # fmt: skip

    draw, every = np.random.default_rng(0), np.arange(len(means))
    again = [count(draw.integers(len(means), size=len(means))) for _ in range(RESAMPLES)]
    found: dict[str, Any] = {"n": len(means)}
    for name, value in count(every).items():
        ends = np.quantile([one[name] for one in again], (0.025, 0.975), axis=0)
        rounded = [np.round(np.float64(x), 4).tolist() for x in (value, ends)]
        found[name] = dict(zip(("value", "interval"), rounded, strict=True))
    return found


@torch.no_grad()
def measure_errors(place: Place, test: Tensor) -> dict[str, list[float]]:
    """Return the RMSE of the clipped estimate of x_0 at each level: of all pixels, and of the channels' means."""
    net, diffusion = load_model(place, CPU).net, Diffusion(place.experiment.diffusion)
    index, found = torch.arange(len(test)), {"pixels": [], "colour": []}
    for level in LEVELS:
        t = torch.full((len(test),), level - 1)
        x_t = diffusion.q_sample(test, t, draw_normal(0, Stream.NLL, level - 1, index, test.shape[1:]))
        output = torch.cat([net(*part) for part in zip(x_t.split(64), t.split(64), strict=True)])
        error = diffusion.predict_x0(output, x_t, t, clip=True) - test
        found["pixels"].append(round(float((error**2).mean().sqrt()), 5))
        found["colour"].append(round(float((error.mean(dim=(2, 3)) ** 2).mean().sqrt()), 5))
    return found


def measure_linear_colour(train: Tensor, test: Tensor) -> list[float]:
    """Return the RMSE of the best linear estimate of the channels' means from those of x_t, at each level.

    It needs three numbers of x_t, and no training: a network that is worse has not learnt the colour.
    """
    means, own = train.mean(dim=(2, 3)).double(), test.mean(dim=(2, 3)).double()
    values, vectors = torch.linalg.eigh(torch.cov(means.T))
    squares = ((own - means.mean(dim=0)) @ vectors).square().mean(dim=0)
    found = []
    for a in Diffusion().tables["alpha_bar"][[level - 1 for level in LEVELS]]:
        noise = (1 - a) / test[0, 0].numel()  # of the mean of a channel
        share = a * values / (a * values + noise)
        found.append(round(float(((1 - share) ** 2 * squares + share**2 * noise / a).mean().sqrt()), 5))
    return found


def draw_samples(places: list[Place]) -> None:
    """Draw the first samples of each set, a row of each."""
    sets = [(place, file.parent) for place in places for file in list_sets(place)]
    figure, axes = plt.subplots(len(sets), figsize=(6.2, 1.2 * len(sets)), squeeze=False)
    for axis, (place, folder) in zip(axes[:, 0], sets, strict=True):
        images, _ = tars.load_images(folder, "samples", 0, SHOWN)
        save_grid(torch.from_numpy(images), SHOWN // 2, PICTURE)
        protocol = read_json(folder / "manifest.json", dict[str, Any])["protocol"]
        how = (
            f"eta {protocol['eta']:g}"
            if protocol["sampler"] == "ddim"
            else f"ancestral {protocol['variance']}"
        )
        seen = place.experiment.train.steps * place.experiment.train.batch_size
        width, groups = place.experiment.model.channels, place.experiment.model.norm_groups
        axis.imshow(plt.imread(PICTURE), interpolation="nearest")
        title = f"{width} channels in {groups} groups, {seen:,} images seen, {protocol['steps']} steps, {how}"
        axis.set_title(title, fontsize=7, loc="left", pad=2)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1:])
