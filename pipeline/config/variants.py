"""Experiments that follow from one: other checkpoints, other weights, the one whose best checkpoint is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pipeline.config.sections import Experiment


def beside(experiment: Experiment) -> dict[str, Experiment]:
    """The same with the other weights, by their name, where evaluate.beside asks for it; else nothing."""
    if not experiment.evaluate.beside:
        return {}
    other: Literal["raw", "ema"] = "raw" if experiment.sample.weights == "ema" else "ema"
    return {other: replace(experiment, sample=replace(experiment.sample, weights=other))}


def candidate(experiment: Experiment, step: int) -> Experiment:
    """How the checkpoint of `step` is scored when the best is looked for: fewer images, and their FID alone."""
    n = experiment.evaluate.checkpoint_images
    return replace(
        experiment,
        sample=replace(experiment.sample, checkpoint=str(step), num_images=n),
        evaluate=replace(experiment.evaluate, metrics=("fid",), checkpoints=None, beside=False),
    )


def chosen(experiment: Experiment, step: int, of: int) -> Experiment:
    """`sample.checkpoint=best` once it is known: the step with the rule behind it, which belongs to the protocol
    (`checkpoint_step` and `checkpoint_rule` read it)."""
    n, weights = experiment.evaluate.checkpoint_images, experiment.sample.weights
    rule = f"best of {of} checkpoints by FID on {n} images, {weights} weights"
    return replace(experiment, sample=replace(experiment.sample, checkpoint=f"{step} ({rule})"))
