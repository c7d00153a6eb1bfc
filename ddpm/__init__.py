"""Denoising diffusion probabilistic models: the mathematics and the networks, usable without the pipeline."""

from ddpm.backbones import NETWORKS, build_network
from ddpm.backbones.context_unet import ContextUNet, ContextUNetConfig
from ddpm.backbones.mha_unet import MHAUNet, MHAUNetConfig
from ddpm.diffusion import Diffusion, DiffusionConfig
from ddpm.ema import EMA
from ddpm.images import from_uint8, to_uint8
from ddpm.likelihood import Likelihood, bits_per_dim, rate_distortion
from ddpm.sampler import (
    Step,
    ancestral,
    ddim,
    few_steps_warning,
    guided,
    interpolate,
    progressive,
    reverse,
    sample,
    shared_latent,
)
from ddpm.timesteps import ImportanceSampler
from ddpm.training import TrainConfig, TrainState, train_step
from ddpm.unet import UNet, UNetConfig

__all__ = [
    "EMA",
    "NETWORKS",
    "ContextUNet",
    "ContextUNetConfig",
    "Diffusion",
    "DiffusionConfig",
    "ImportanceSampler",
    "Likelihood",
    "MHAUNet",
    "MHAUNetConfig",
    "Step",
    "TrainConfig",
    "TrainState",
    "UNet",
    "UNetConfig",
    "ancestral",
    "bits_per_dim",
    "build_network",
    "ddim",
    "few_steps_warning",
    "from_uint8",
    "guided",
    "interpolate",
    "progressive",
    "rate_distortion",
    "reverse",
    "sample",
    "shared_latent",
    "to_uint8",
    "train_step",
]
