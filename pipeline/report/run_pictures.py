"""The pictures on the page of one run: copied from other stages, or drawn."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm.config import DiffusionConfig
from ddpm.schedules import get_betas
from pipeline.drawing import charts
from pipeline.drawing.charts import SMALL, Line, Panel, Picture, save_picture
from pipeline.drawing.grids import save_grid
from pipeline.report.run_files import RunFiles
from pipeline.scores.metrics import Bound, Metric, Scores
from pipeline.store.files import require_sealed, try_read
from pipeline.store.tars import load_images, open_shards

LEAST_WIDTH = 1000  # pixels; smaller pictures are enlarged, so that their pixels stay sharp
STEP_GRIDS = 4
FIRST = 16  # images of a kind at the top of the page
FIGURE_5_SVG = "rate_distortion.svg"  # left out: the page draws its panels with the paper's points
# metric of log.jsonl: name of the file, title, logarithmic, caption
TRAINING = {
    "train/loss": ("loss", "Loss", True, "Loss, per window of steps (faint) and smoothed"),
    "train/grad_norm": ("grad-norm", "Gradient norm", True, "Gradient norm before clipping"),
    "train/lr": ("lr", "Learning rate", False, "Learning rate"),
    "train/images_per_second": ("speed", "Images per second", False, "Images per second, all workers"),
}
FIGURE_5 = {
    "rd-distortion": "RMSE against reverse steps T − t (paper, Fig. 5)",
    "rd-rate": "Rate, bits/dim against reverse steps T − t (paper, Fig. 5)",
    "rd": "RMSE against rate, bits/dim (paper, Fig. 5)",
}


def draw_first_images(run: RunFiles, folder: Path) -> list[Picture]:
    """Draw the first samples, and beside them as many real images, of the test split if there is one."""
    if "grid" not in run.paths:
        return []
    pictures: list[Picture] = []
    for shards, split, words in (
        (run.place.samples, "samples", "Samples"),
        (run.place.data, "test", "Test images"),
        (run.place.data, "train", "Training images"),
    ):
        facts = try_read(open_shards, shards) if len(pictures) < 2 else None
        n = min(FIRST, facts.count_images(split)) if facts and split in facts.splits else 0
        if n and (found := try_read(load_images, shards, split, 0, n)):
            save_grid(torch.from_numpy(found[0]), 4, folder / f"first-{split}.png")
            pictures.append(Picture(f"first-{split}.png", f"{words}, the first {n}"))
    return pictures


def copy_figures(run: RunFiles, folder: Path) -> list[Picture]:
    """Copy the figures in their order, after the first samples if no figure shows these."""
    manifest = run.get_content("figures")
    files = [run.place.figures / name for name in manifest.get("order", []) if name != FIGURE_5_SVG]
    whole = {file.name: file for file in files if try_read(require_sealed, file)}
    pictures = [copy_picture(file, folder, manifest["captions"][name]) for name, file in whole.items()]
    if "samples.png" not in whole and "grid" in run.paths:
        pictures.insert(0, copy_picture(run.paths["grid"], folder, "The first samples, not selected"))
    return pictures


def copy_step_grids(run: RunFiles, folder: Path) -> list[Picture]:
    """Copy a few of the grids that training drew, the first and the last among them."""
    last = len(run.step_grids) - 1
    numbers = sorted({round(i * last / (STEP_GRIDS - 1)) for i in range(STEP_GRIDS)}) if last >= 0 else []
    grids = [run.step_grids[number] for number in numbers]
    return [copy_picture(grid, folder, f"Step {int(grid.stem):,}") for grid in grids]


def copy_picture(file: Path, folder: Path, caption: str) -> Picture:
    """Copy a picture into the page's folder: a PNG enlarged by a whole factor to LEAST_WIDTH at least."""
    if file.suffix == ".svg":
        shutil.copyfile(file, folder / file.name)
    else:
        with Image.open(file) as image:
            times = -(-LEAST_WIDTH // image.width)
            size = (times * image.width, times * image.height)
            image.resize(size, Image.Resampling.NEAREST).save(folder / file.name)
    return Picture(file.name, caption)


def draw_training(run: RunFiles, folder: Path) -> list[Picture]:
    """Draw the curves of training that are in the log."""
    pictures = []
    for metric, (name, title, log, caption) in TRAINING.items():
        steps, values = run.read_series(metric)
        if steps:
            smooth = [Line(steps, values, kind="faint"), Line(steps, charts.smooth(values))]
            lines = [Line(steps, values)] if metric == "train/lr" else smooth
            pictures.append(save_picture(folder, name, Panel(title, "step", lines, log_y=log), caption))
    return pictures


def draw_checkpoints(
    candidates: Mapping[int, Scores], best: int, metric: Metric, published: Mapping[int, float], folder: Path
) -> Picture:
    """Draw the candidates by step with their errors, the best one with a circle, and the published {step: FID}."""
    values = [scores[metric.name] for scores in candidates.values()]
    errors = np.array([scores.get(f"{metric.name}_se") or 0.0 for scores in candidates.values()])
    lines = [
        Line(list(candidates), values, "this run" if published else "", "steps", errors),
        Line([best], [candidates[best][metric.name]], "best", "best"),
    ]
    if published:
        lines.append(Line(list(published), list(published.values()), "published, n = 50,000", "marks"))
    panel = Panel(metric.heading, "step", lines, log_x=bool(published), log_y=bool(published))
    beside = ", with published scores of the same recipe" if published else ""
    return save_picture(folder, "selection", panel, f"{metric.heading} against training steps{beside}")


def draw_class_shares(shares: Sequence[float], folder: Path) -> Picture:
    """Draw the share of the samples in each class, as bars."""
    caption = f"Each class holds {min(shares):.1%} to {max(shares):.1%} of the samples, as the classifier sees them."
    bars = Line(range(len(shares)), [100 * share for share in shares], kind="bars")
    panel = Panel("Samples by class, %", "class", [bars])
    return save_picture(folder, "classes", panel, caption)


def draw_bound(bound: Bound, folder: Path) -> list[Picture]:
    """Draw the terms of the bound and the error of the estimate of x_0 over t."""
    t = range(1, len(bound["terms"]) + 1)
    rmse = [127.5 * value**0.5 for value in bound["mse"]]
    terms = Panel("NLL terms, bits/dim", "t", [Line(t, bound["terms"])], log_x=True, log_y=True)
    error = Panel("RMSE of the estimate of x_0", "t", [Line(t, rmse)])
    scale = "Root mean square error of the estimate of x_0, on the scale 0 to 255"
    return [
        save_picture(folder, "terms", terms, "Term of the bound at each t; the first is the decoder's L_0"),
        save_picture(folder, "error", error, scale),
    ]


def draw_rate_distortion(
    bound: Bound, table: Mapping[int, tuple[float, float]], folder: Path
) -> list[Picture]:
    """Draw each panel of Fig. 5 as a separate picture, with the paper's points."""
    panels = charts.plot_rate_distortion(bound["rate_distortion"], table)
    return [save_picture(folder, *part) for part in zip(FIGURE_5, panels, FIGURE_5.values(), strict=True)]


def draw_schedule(diffusion: DiffusionConfig, folder: Path) -> tuple[float, list[Picture]]:
    """Draw beta, alpha_bar and the signal-to-noise ratio over t. Return alpha_bar at t = T, and the pictures."""
    beta = get_betas(diffusion)
    alpha_bar = torch.cumprod(1 - beta, 0)
    snr = alpha_bar / (1 - alpha_bar)
    t, pictures = range(1, len(beta) + 1), []
    for name, title, y, caption in (
        ("beta", "β", beta, "Variance added at each step"),
        ("alpha-bar", "ᾱ", alpha_bar, "Share of the image's variance in x_t"),
        ("snr", "ᾱ / (1 − ᾱ)", snr, "Signal-to-noise ratio of x_t"),
    ):
        panel = Panel(title, "t", [Line(t, y.tolist())], log_y=name == "snr", size=SMALL)
        pictures.append(save_picture(folder, name, panel, caption))
    return alpha_bar[-1].item(), pictures
