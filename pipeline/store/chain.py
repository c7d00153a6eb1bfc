"""The reverse process of a run: its diffusion, its network and its labels, for drawing images."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm.diffusion import Diffusion, Network
from ddpm.networks import NO_LABEL
from ddpm.sampler import add_guidance, space_timesteps
from pipeline.config import Experiment
from pipeline.store.checkpoint import load_network
from pipeline.store.run import Place


def build_diffusion(experiment: Experiment) -> Diffusion:
    """Build the diffusion of all T steps, or of sample.steps of them."""
    diffusion, config = Diffusion(experiment.diffusion), experiment.sample
    if config.steps is None:
        return diffusion
    return diffusion.respace(space_timesteps(diffusion, config.steps, config.spacing))


def load_guided_network(place: Place, device: torch.device, compiled: bool = False) -> Network:
    """Load the selected network, with guidance if sample.guidance_scale asks for it."""
    config = place.experiment.sample
    net = load_network(place, device, config.precision, compiled)
    return add_guidance(net, config.guidance_scale, NO_LABEL) if config.guidance_scale != 1 else net


def make_labels(experiment: Experiment, index: Tensor) -> Tensor | None:
    """Return the labels for images `index` (N,), int64 (N,) on its device; None without labels."""
    labels = [experiment.choose_label(number) for number in index.tolist()]
    return None if experiment.sample.label is None else torch.tensor(labels, device=index.device)
