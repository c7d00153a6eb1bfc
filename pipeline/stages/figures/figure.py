"""A figure of the paper: its caption, its units and how it is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.compute.units import Unit
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.store.keys import hash_content
from pipeline.store.run import Place


class FigureUnavailable(PipelineError):
    """Raised if this run lacks something that a figure needs; the message names it and the command that makes it."""


@dataclass(frozen=True)
class Figure:
    """A figure to draw: `draw(unit files, path)` writes the picture `file` after its units are done.

    It returns what the figure shows, in a sentence, if that is worth one. preparations: units that come before the
    others.
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
