"""The figures stage: which of the paper's figures are drawn for one checkpoint, their units, and the seal.

A unit's file is named after all that it depends on, so asking for another figure repeats nothing. A figure that
needs what the run does not have is left out, and the manifest says why. Every configuration is checked against FIGURES,
so the modules that import torch are imported when they are needed.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.compute.units import Unit
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.stages.stage import Stage
from pipeline.store import files
from pipeline.store.arrays import is_unit_done, read_arrays
from pipeline.store.keys import hash_content
from pipeline.store.run import Place

log = logging.getLogger(__name__)

FIGURES = (
    "samples", "progressive", "interpolation", "coarse_to_fine", "shared_latents", "rate_distortion", "scores_along",
    "nearest_pixels", "nearest_features", "steps", "optimum",
)  # fmt: skip


class FigureUnavailable(PipelineError):
    """Raised if this run lacks something that a figure needs; the message names it and the command that makes it."""


@dataclass(frozen=True)
class Figure:
    """A figure to draw: `draw(unit files, path)` writes the picture `file` after its units are done.

    It may return a sentence on what the figure shows. preparations: units that come before the others.
    """

    file: str
    caption: str
    units: dict[Path, Unit]
    draw: Callable[[list[Path], Path], str | None]
    preparations: tuple[Unit, ...] = ()


def locate_unit_folder(place: Place, kind: str, *depends: str | int) -> Path:
    """Return the folder of a figure's units; its key covers the sampler and `depends`."""
    return place.figure_units / f"{kind}-{hash_content([place.sample_key, *depends])}"


def count_rows(experiment: Experiment) -> int:
    """Return the number of rows: figures.images, at most the number of samples."""
    return min(experiment.figures.images, experiment.sample.num_images)


def describe_chain(experiment: Experiment) -> str:
    """Describe the length of the chain for a caption."""
    timesteps, steps = experiment.diffusion.timesteps, experiment.sample.steps
    return f"T = {timesteps:,}" + (f", respaced to {steps:,} steps" if steps not in (None, timesteps) else "")


class FiguresStage(Stage):
    """The stage that draws the paper's figures of the selected checkpoint."""

    name = "figures"
    uses_checkpoint = True

    def list_required_stages(self, experiment: Experiment) -> tuple[str, ...]:
        return ("shard", "train", "sample")

    def is_done(self, place: Place) -> bool:
        """Return whether the figures are sealed, and either none is missing or they were drawn after the scores."""
        manifest = files.try_read(files.read_manifest, place.figures, files.FiguresManifest)
        return manifest is not None and (not manifest.get("skipped") or manifest.get("scored", False))

    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Yield the units whose results are missing, then draw the pictures and seal the folder."""
        if place.figures_manifest.exists():  # sealed, but changed or incomplete, as is_done has found
            for file in [*place.figures.iterdir()]:
                file.unlink()
        scored = place.scores_manifest.exists()
        figures, skipped = plan_figures(place)
        if preparations := [unit for figure in figures for unit in figure.preparations]:
            yield preparations
        units = {file: unit for figure in figures for file, unit in figure.units.items()}
        yield [unit for file, unit in units.items() if not is_unit_done(file, read_arrays)]
        drawn = {f.file: f.draw(list(f.units), place.figures / f.file) for f in figures}
        findings = {file: finding for file, finding in drawn.items() if finding}
        captions = {figure.file: figure.caption for figure in figures}
        facts = {"captions": captions, "findings": findings, "skipped": skipped, "scored": scored}
        files.write_manifest(place.figures, [*drawn], order=[*drawn], **facts)


STAGE = FiguresStage()


def plan_figures(place: Place) -> tuple[list[Figure], dict[str, str]]:
    """Return the figures that can be drawn, and the reasons for the others, by name."""
    from pipeline.stages.figures import chains, curves, nearest, optimum

    plans = {
        "samples": chains.plan_samples,
        "progressive": chains.plan_progressive_generation,
        "interpolation": chains.plan_interpolation,
        "coarse_to_fine": chains.plan_coarse_to_fine,
        "shared_latents": chains.plan_shared_latents,
        "rate_distortion": curves.plan_rate_distortion,
        "scores_along": curves.plan_scores_along_chain,
        "nearest_pixels": nearest.plan_neighbours,
        "nearest_features": lambda p: nearest.plan_neighbours(p, curves.find_extractor_of_scores(p)),
        "steps": chains.plan_steps,
        "optimum": optimum.plan_distance_to_optimum,
    }
    figures, skipped = [], {}
    for name in place.experiment.figures.which:
        try:
            figures.append(plans[name](place))
        except FigureUnavailable as error:
            log.warning("figure %s is left out: %s", name, error)
            skipped[name] = str(error)
    return figures, skipped
