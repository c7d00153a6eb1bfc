"""Experiments that follow from one: other checkpoints, the one whose best checkpoint is known."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.sections import Experiment


def candidate(experiment: Experiment, step: int) -> Experiment:
    """How the checkpoint of `step` is scored when the best is looked for: fewer images, and their FID alone."""
    n = experiment.evaluate.checkpoint_images
    return replace(
        experiment,
        sample=replace(experiment.sample, checkpoint=str(step), num_images=n),
        evaluate=replace(experiment.evaluate, metrics=("fid",), checkpoints=None),
    )


def chosen(experiment: Experiment, step: int, of: int) -> Experiment:
    """`sample.checkpoint=best` once it is known: the step with the rule behind it, which belongs to the protocol
    (`checkpoint_step` and `checkpoint_rule` read it)."""
    n, weights = experiment.evaluate.checkpoint_images, experiment.sample.weights
    rule = f"best of {of} checkpoints by FID on {n} images, {weights} weights"
    return replace(experiment, sample=replace(experiment.sample, checkpoint=f"{step} ({rule})"))
