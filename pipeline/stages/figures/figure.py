"""What a figure consists of, and what its units share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.diffusion import Diffusion
from ddpm.sampler import spaced_timesteps
from pipeline.compute.work import Unit
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.store.keys import hash_of, sample_key
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


def unit_folder(experiment: Experiment, run: Place, kind: str, *depends: Any) -> Path:
    """Where results are kept that depend on how samples are drawn, and on `depends`."""
    return run.figure_units / f"{kind}-{hash_of([sample_key(experiment, run.run_key), *depends])}"


def chain_of(experiment: Experiment) -> Diffusion:
    """The reverse process that samples are drawn by: all T steps, or sample.steps of them."""
    diffusion, steps = Diffusion(experiment.diffusion), experiment.sample.steps
    return diffusion.respaced(spaced_timesteps(len(diffusion), steps)) if steps else diffusion


def in_words(experiment: Experiment) -> str:
    """How long the chain is, for captions."""
    timesteps, steps = experiment.diffusion.timesteps, experiment.sample.steps
    return f"T = {timesteps:,}" + (f", respaced to {steps:,} steps" if steps not in (None, timesteps) else "")
