"""Which checkpoint of an experiment is sampled and scored, and the experiments of one that differ in it."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.sections import Choice, Experiment
from pipeline.errors import PipelineError


def checkpoint_step(experiment: Experiment) -> int:
    """Return the training step whose weights are sampled and scored. Raises PipelineError where that is the best of
    several and not known yet."""
    which = experiment.sample.checkpoint
    if isinstance(which, int):
        return which
    if which == "last":
        return experiment.train.steps
    if experiment.choice is None:
        raise PipelineError(
            "sample.checkpoint=best is known once evaluate.checkpoints are scored; `ddpm sample` does that first"
        )
    return experiment.choice.step


def checkpoint_rule(experiment: Experiment) -> str | None:
    """Say how the step was chosen, where it is the best of several: part of the protocol of every score."""
    return str(experiment.choice) if experiment.sample.checkpoint == "best" and experiment.choice else None


def weights_kind(experiment: Experiment) -> str:
    """Return what a protocol calls the weights that are sampled and scored: ema, raw or unknown."""
    return experiment.published.weights or experiment.sample.weights


def candidate(experiment: Experiment, step: int) -> Experiment:
    """Return the experiment by which the checkpoint of `step` is judged when the best is looked for: fewer images,
    and their FID alone."""
    n = experiment.evaluate.checkpoint_images
    return replace(
        experiment,
        sample=replace(experiment.sample, checkpoint=step, num_images=n),
        evaluate=replace(experiment.evaluate, metrics=("fid",), checkpoints=None),
    )


def choose(experiment: Experiment, step: int, candidates: int) -> Experiment:
    """Return the experiment with sample.checkpoint=best known to be `step`, the best of so many candidates."""
    images, weights = experiment.evaluate.checkpoint_images, experiment.sample.weights
    return replace(experiment, choice=Choice(step, candidates, images, weights))
