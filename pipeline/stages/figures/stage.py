"""Which figures are drawn, out of which units, and the seal.

What units make is kept under all that it depends on, so asking for another figure repeats nothing. A figure
that needs what the run has not got is left out; the manifest says why.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from pipeline.compute.work import Unit
from pipeline.config import Experiment
from pipeline.drawing.grids import save_grid
from pipeline.errors import PipelineError
from pipeline.stages.figures import chains, curves, nearest, scores_along
from pipeline.stages.figures.figure import Figure, Unavailable
from pipeline.store import tars
from pipeline.store.files import MANIFEST, read_manifest, write_manifest
from pipeline.store.run import Place

log = logging.getLogger(__name__)

SAMPLES_SIDE = 16


def directory(experiment: Experiment, run: Place) -> Path:
    return run.of(experiment).figures


def is_done(experiment: Experiment, run: Place) -> bool:
    """Whether the figures are sealed, and those that were left out have nothing more to wait for."""
    try:
        manifest = read_manifest(directory(experiment, run), check="size")
    except PipelineError as error:
        log.warning("%s; its figures are drawn again", error)
        return False
    scored = (run.of(experiment).scores_manifest).exists()
    return manifest is not None and (scored or not manifest["skipped"])


def work(experiment: Experiment, run: Place) -> Iterator[list[Unit]]:
    """Yields the units whose results are missing, then draws the pictures and seals the folder."""
    folder = directory(experiment, run)
    if (folder / MANIFEST).exists():  # sealed, but not what was sealed, or not all: is_done said so
        for file in (folder / MANIFEST, *folder.glob("*.png"), *folder.glob("*.svg")):
            file.unlink(missing_ok=True)
    figures, skipped = plan(experiment, run)
    units = {file: unit for figure in figures for file, unit in figure.units.items()}
    yield [unit for file, unit in units.items() if not file.exists()]
    for figure in figures:
        if not (folder / figure.file).exists():
            figure.draw(list(figure.units), folder / figure.file)
    order = [figure.file for figure in figures]
    captions = {figure.file: figure.caption for figure in figures}
    write_manifest(folder, order, order=order, captions=captions, skipped=skipped)


def plan(experiment: Experiment, run: Place) -> tuple[list[Figure], dict[str, str]]:
    """The figures asked for that can be drawn, and the reasons why others cannot."""
    figures, skipped = [], {}
    for name in experiment.figures.which:
        try:
            figures.append(FIGURES[name](experiment, run))
        except Unavailable as error:
            log.warning("figure %s is left out: %s", name, error)
            skipped[name] = str(error)
    return figures, skipped


def samples(experiment: Experiment, run: Place) -> Figure:
    folder = run.of(experiment).samples
    caption = "Unconditional samples" if experiment.sample.label is None else "Samples"
    caption += ", the first ones, not selected (paper, Fig. 13)"
    shown = min(SAMPLES_SIDE**2, experiment.sample.num_images)
    return Figure("samples.png", caption, {}, partial(_draw_samples, folder, shown))


def _draw_samples(folder: Path, shown: int, files: list[Path], file: Path) -> None:
    """The first samples of the set, in a square."""
    images, _ = tars.load_images(folder, "samples", 0, shown)
    save_grid(torch.from_numpy(images), min(SAMPLES_SIDE, max(1, int(shown**0.5))), file)


FIGURES: dict[str, Callable[[Experiment, Place], Figure]] = {
    "samples": samples,
    "progressive": chains.progressive,
    "interpolation": chains.interpolation,
    "coarse_to_fine": chains.coarse_to_fine,
    "shared_latents": chains.shared_latents,
    "rate_distortion": curves.rate_distortion,
    "scores_along": scores_along.scores_along,
    "nearest_pixels": nearest.nearest_pixels,
    "nearest_features": nearest.nearest_features,
}
