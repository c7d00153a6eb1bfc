"""What a figure consists of, and what its units share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.compute.units import Unit
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.store.keys import hash_content
from pipeline.store.run import Place


class Unavailable(PipelineError):
    """A figure needs what this run does not have; the message says what, and what makes it."""


@dataclass(frozen=True)
class Figure:
    """`draw` makes the picture `file` out of the results of `units`, which are complete or absent files."""

    file: str
    caption: str
    units: dict[Path, Unit]
    draw: Callable[[list[Path], Path], None]


def unit_folder(place: Place, kind: str, *depends: str | int) -> Path:
    """Return where results are kept that depend on how samples are drawn, and on `depends`."""
    return place.figure_units / f"{kind}-{hash_content([place.sample_key, *depends])}"


def count_rows(experiment: Experiment) -> int:
    """Count the rows of a figure: never more than there are samples, so that small runs stay small."""
    return min(experiment.figures.images, experiment.sample.num_images)


def describe_chain(experiment: Experiment) -> str:
    """Say how long the chain is, for captions."""
    timesteps, steps = experiment.diffusion.timesteps, experiment.sample.steps
    return f"T = {timesteps:,}" + (f", respaced to {steps:,} steps" if steps not in (None, timesteps) else "")
