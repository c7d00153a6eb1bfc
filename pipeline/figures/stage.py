"""The figures stage: pictures of the paper's figures, one work unit each."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ddpm.diffusion import Diffusion
from ddpm.images import grid, to_uint8
from ddpm.sampler import reverse
from pipeline import tars
from pipeline.checkpoint import load_network
from pipeline.config import Experiment, checkpoint_step, figures_key, sample_key
from pipeline.errors import PipelineError
from pipeline.rundir import MANIFEST, Run, atomic_file, read_manifest, write_manifest
from pipeline.worker import Unit, WorkerContext

log = logging.getLogger(__name__)

SAMPLES_SIDE = 16
PROGRESSIVE_IMAGES, PROGRESSIVE_STAGES = 10, 10
CELL_PIXELS = 64  # smaller images are enlarged

CAPTIONS = {
    "samples": "Unconditional samples, the first ones, not selected (paper, Fig. 13)",
    "progressive": "Progressive generation: the estimate of x_0 along the reverse process, left to right (Fig. 6)",
}


def directory(experiment: Experiment, run: Run) -> Path:
    return run.figures(figures_key(experiment, run.run_key))


def is_done(experiment: Experiment, run: Run) -> bool:
    try:
        return read_manifest(directory(experiment, run), check="size") is not None
    except PipelineError as error:
        log.warning("%s; its figures are drawn again", error)
        return False


def work(experiment: Experiment, run: Run) -> Iterator[list[Unit]]:
    """Yields the figures that are missing, then seals the folder."""
    folder, which = directory(experiment, run), experiment.figures.which
    if (folder / MANIFEST).exists():  # sealed, but not what was sealed: is_done said so
        for file in (folder / MANIFEST, *(_file(folder, name) for name in which)):
            file.unlink(missing_ok=True)
    yield [
        Unit(DRAW[name], (experiment, run, _file(folder, name)), f"figure {name}", PROGRESSIVE_IMAGES)
        for name in which
        if not _file(folder, name).exists()
    ]
    captions = {_file(folder, name).name: CAPTIONS[name] for name in which}
    write_manifest(folder, captions, captions=captions)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def draw_samples(ctx: WorkerContext, experiment: Experiment, run: Run, file: Path) -> None:
    """The work unit: the first samples of the set, in a square."""
    folder = run.samples(sample_key(experiment, run.run_key))
    shown = min(SAMPLES_SIDE**2, experiment.sample.num_images)
    images, _ = tars.load_images(folder, "samples", 0, shown)
    columns = min(SAMPLES_SIDE, max(1, int(shown**0.5)))
    _save(torch.from_numpy(images), columns, file)


def draw_progressive(ctx: WorkerContext, experiment: Experiment, run: Run, file: Path) -> None:
    """The work unit: a row for each of the first samples, its estimates of x_0 from noise to image."""
    stages = progressive(ctx, experiment, run, min(PROGRESSIVE_IMAGES, experiment.sample.num_images))
    rows = stages.transpose(0, 1).flatten(0, 1)  # (images * stages, C, H, W)
    _save(to_uint8(rows), len(stages), file)


def progressive(ctx: WorkerContext, experiment: Experiment, run: Run, images: int) -> Tensor:
    """Estimates of x_0 in [-1, 1], (stages, images, C, H, W), evenly spaced over the chain of the first
    samples; the last is its end."""
    config, data = experiment.sample, experiment.data
    net = load_network(experiment, run, checkpoint_step(experiment), config.weights, ctx.device)
    chain = reverse(
        Diffusion(experiment.diffusion), net,
        index=torch.arange(images), shape=(data.channels, data.image_size, data.image_size),
        seed=experiment.seed, sampler=config.sampler, steps=config.steps, eta=config.eta,
        variance=config.variance, device=ctx.device,
    )  # fmt: skip
    kept = shown_steps(config.steps or experiment.diffusion.timesteps)
    return torch.stack([step.x_0.cpu() for number, step in enumerate(chain, 1) if number in kept])


def shown_steps(steps: int) -> set[int]:
    """Which of 1..steps are shown: the end of each tenth of the chain."""
    return {-(-stage * steps // PROGRESSIVE_STAGES) for stage in range(1, PROGRESSIVE_STAGES + 1)}


def _save(images: Tensor, columns: int, file: Path) -> None:
    """uint8 images (N,C,H,W) as one picture."""
    picture = grid(images, columns, max(1, CELL_PIXELS // images.shape[-1]))
    with atomic_file(file) as temporary:
        Image.fromarray(picture.numpy()).save(temporary, format="PNG")


DRAW: dict[str, Callable[..., None]] = {"samples": draw_samples, "progressive": draw_progressive}
