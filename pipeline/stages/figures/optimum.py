"""The distance to the optimum by noise level. The optimum is the posterior mean of x_0, which two estimators bound.

The best linear denoiser is known everywhere, in closed form. The error of the posterior mean over the training images
is above the optimum for other images, and below it for these images. Where both agree, the optimum is known.
"""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm.denoisers import compute_linear_mse, compute_posterior_mean
from ddpm.diffusion import Diffusion, Network
from ddpm.images import from_uint8
from ddpm.likelihood import compute_bits_per_dim
from ddpm.rng import Stream, draw_normal
from pipeline.compute.units import Unit, UnitKind, Worker, make_image_units
from pipeline.drawing import charts
from pipeline.report import paper
from pipeline.scores.preparations import list_gaussian_units, load_linear_denoiser, load_variances
from pipeline.stages.figures import Figure, FigureUnavailable, locate_unit_folder
from pipeline.store import checkpoint, tars
from pipeline.store.arrays import read_arrays, write_arrays
from pipeline.store.run import Place

LEVELS, LARGEST = 20, 64 * 64 * 3
COMPARED, OF_POSTERIOR = 128, 256  # images for the network, and of each split for the posterior mean
UNIT_IMAGES = 64  # of the network
KNOWN_IMAGES = 50_000  # training images in the posterior
NOISY = 0.1  # alpha_bar below which the posterior mean is computed: elsewhere it is a single image
AGREE = 0.02  # of the RMSE, between the two sides


def list_levels(diffusion: Diffusion, most: float = 1.0) -> list[int]:
    """Return the timesteps T - k of the noise levels with alpha_bar up to `most`, the noisiest first."""
    length, alpha_bar = len(diffusion), diffusion.tables["alpha_bar"]
    levels = sorted({length - max(1, round(length * i / LEVELS)) for i in range(1, LEVELS + 1)}, reverse=True)
    return [t for t in levels if alpha_bar[t] <= most] or levels[:1]


def plan_distance_to_optimum(place: Place) -> Figure:
    """Plan the comparison of the network with the linear denoiser and with the exact posterior mean."""
    experiment, index = place.experiment, tars.open_shards(place.data)
    units: dict[Path, Unit] = {}
    if prod(experiment.data.shape) > LARGEST or "test" not in index.splits:
        raise FigureUnavailable("it needs images of at most 64x64 pixels, and a test split")
    for split in ("test", "train"):
        n, title = min(OF_POSTERIOR, index.count_images(split)), f"the posterior mean of {split} images"
        folder, args = place.optimum / split, (place, split, True)
        units |= make_image_units(UnitKind.FIGURE, write_errors, args, n, n, folder, title, LEVELS)
    n, own = min(COMPARED, index.count_images("test")), locate_unit_folder(place, "optimum")
    args, title = (place, "test", False), "errors of test images"
    units |= make_image_units(UnitKind.FIGURE, write_errors, args, n, UNIT_IMAGES, own, title, LEVELS)
    folders = (place.optimum / "test", place.optimum / "train", own)
    caption = (
        "Distance to the optimum by noise level: RMSE of the estimate of x_0 of test images (0 to 255), and its "
        "excess over the best linear denoiser's on the same images and noise, with twice its standard error"
    )

    def draw(files: list[Path], file: Path) -> str:
        parts = [[read_arrays(one)["errors"] for one in files if one.parent == folder] for folder in folders]
        return draw_distance(place, [np.concatenate(errors, axis=-1) for errors in parts], file)

    return Figure("optimum.svg", caption, units, draw, tuple(list_gaussian_units(place)))


def write_errors(
    ctx: Worker, place: Place, split: str, exact: bool, start: int, stop: int, file: Path
) -> None:
    """Write mean square errors (3, L, n) of images [start, stop) at the levels (body of a unit).

    They are those of the network (or of the exact posterior mean, at the noisy levels alone), of the linear denoiser
    on the same draws, and of the mean image.
    """
    experiment, shape = place.experiment, place.experiment.data.shape
    pixels, classes = tars.load_images(place.data, split, start, stop)
    x_0 = from_uint8(torch.from_numpy(pixels).to(ctx.device))
    index = torch.arange(start, stop, device=ctx.device)
    # One whose network predicts x_0.
    direct = Diffusion(replace(experiment.diffusion, predict="x0", variance="fixedlarge", loss="simple"))
    levels, seed = list_levels(direct, NOISY if exact else 1), 0 if exact else experiment.seed

    def measure(net: Network, diffusion: Diffusion = direct, **how: Any) -> torch.Tensor:
        return compute_bits_per_dim(
            diffusion, net, x_0, lambda t, rows: draw_normal(seed, Stream.NLL, t, index[rows], shape),
            timesteps=levels, **{"clip": False, **how},
        ).mse.T  # fmt: skip

    if exact:
        known = torch.from_numpy(tars.load_images(place.data, "train")[0][:KNOWN_IMAGES]).to(ctx.device)
        table = direct.to(ctx.device).tables["alpha_bar"]
        ours = measure(lambda x_t, t: compute_posterior_mean(x_t, table[t], known))
    else:
        labels = torch.from_numpy(classes).to(ctx.device) if experiment.model.takes_labels else None
        net = checkpoint.load_model(place, ctx.device, experiment.sample.precision).net
        ours = measure(net, Diffusion(experiment.diffusion), clip=True, context=labels)
    linear, mean = load_linear_denoiser(place, direct, ctx.device)
    of_mean = ((x_0.flatten(1) - mean) ** 2).mean(dim=1).double().cpu().expand_as(ours)
    write_arrays(file, errors=torch.stack([ours, measure(linear), of_mean]).numpy())


def compare_errors(ours: np.ndarray, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return RMSE / RMSE of the linear denoiser - 1, and its standard error (L,), by the delta method.

    Of mean square errors (L, n) of the same images and noise.
    """
    excess = np.sqrt(ours.mean(axis=1) / linear.mean(axis=1)) - 1
    paired = [errors / errors.mean(axis=1, keepdims=True).clip(min=1e-30) for errors in (ours, linear)]
    return excess, (1 + excess) / 2 * (paired[0] - paired[1]).std(axis=1) / np.sqrt(ours.shape[1])


def draw_distance(place: Place, parts: list[np.ndarray], file: Path) -> str:
    """Draw the figure from the files of `write_errors`; return its result in sentences.

    parts: of the posterior mean on test and training images, and of the network. Numbers of all test images
    are compared with the linear denoiser of all training images.
    """
    test, train, network = parts
    diffusion = Diffusion(place.experiment.diffusion)
    levels = list_levels(diffusion)
    k, official = [len(diffusion) - t for t in levels], tars.open_shards(place.data).facts.get("official")
    mse = compute_linear_mse(load_variances(place)[0], diffusion.tables["alpha_bar"])
    of_all = 127.5 * mse[levels].sqrt().numpy()
    (excess, error), (above, _), (below, _) = (compare_errors(*mses[:2]) for mses in (network, test, train))
    best = np.minimum(above, 0)
    known = [i for i in range(len(best)) if best[i] - below[i] < AGREE]
    ours, linear, mean = 127.5 * np.sqrt(network.mean(axis=-1))
    others: list[tuple[str, charts.Kind, dict[int, float]]] = [
        ("optimum, where known", "best", {i: of_all[i] * (1 + best[i]) for i in known})
    ]
    if official and paper.has_paper_schedule(diffusion.config):
        table = {k.index(steps): rmse for steps, (_, rmse) in paper.TABLE_4.items() if steps in k}
        others.append(("paper, Table 4", "marks", table))
    errors = [charts.Line(k, ours, "network"), charts.Line(k, linear, "best linear denoiser", "other")]
    distance = [charts.Line(k, 100 * excess, "network", band=200 * error)]
    for name, kind, rmses in others:
        steps, excesses = [k[i] for i in rmses], [100 * (rmse / of_all[i] - 1) for i, rmse in rmses.items()]
        errors.append(charts.Line(steps, [*rmses.values()], name, kind))
        distance.append(charts.Line(steps, excesses, name, kind))
    panels = {"RMSE": errors, "RMSE over the best linear denoiser's, %": distance}
    axis = "reverse steps T − t"
    charts.save_panels([charts.Panel(title, axis, lines) for title, lines in panels.items()], file)
    lost = (excess > np.maximum(2 * error, AGREE)) if place.experiment.sample.is_deterministic else ()
    return describe_distance(k, ours, linear, float(mean[0]), int(np.sum(lost)))


def describe_distance(k: list[int], ours: np.ndarray, linear: np.ndarray, mean: float, lost: int = 0) -> str:
    """Describe where the network's RMSE is farthest above the linear denoiser's, and where the mean image is better.

    lost: at how many levels a network that a deterministic chain samples is surely worse than linear.
    """
    worst = int(np.argmax(ours / linear))
    found = (
        f"The network loses most at k = {k[worst]:,} reverse steps: RMSE {ours[worst]:.2f}, where the best "
        f"linear denoiser has {linear[worst]:.2f} ({ours[worst] / linear[worst] - 1:+.1%})."
    )
    if worse := [steps for steps, rmse in zip(k, ours, strict=True) if rmse > mean]:
        found += f" **It is worse than predicting the mean image** ({mean:.2f}) up to k = {worse[-1]:,}."
    if lost:
        found += (
            f" **The sampler is deterministic and the network unfinished**: at {lost} of {len(k)} noise levels it "
            "is worse than the best linear denoiser, and no fresh noise corrects that; sample with "
            "`sample.sampler=ancestral sample.variance=fixedsmall` (docs/results/short-runs.md)."
        )
    return found
