"""Denoising diffusion probabilistic models: the mathematics and the networks, usable without the pipeline.

Names are resolved when they are first used, so that a program that reads configurations only imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "EMA", "NETWORKS", "NO_LABEL", "AnnotatedUNet", "AnnotatedUNetConfig", "ApiUNet", "ApiUNetConfig",
    "BoundTerms", "ContextUNet", "ContextUNetConfig", "Diffusion", "DiffusionConfig", "ImportanceSampler",
    "MHAUNet", "MHAUNetConfig", "Model", "ReverseStep", "TrainConfig", "TrainState", "UNet", "UNetConfig",
    "accelerate", "add_guidance", "build_model", "build_network", "compute_batch_loss",
    "compute_bits_per_dim", "compute_rate_distortion", "draw_gaussian", "draw_shared_latent",
    "explain_few_steps", "from_uint8", "interpolate", "run_chain", "run_image_chains", "sample",
    "step_back", "to_uint8", "train_step",
]  # fmt: skip

if TYPE_CHECKING:
    from ddpm.config import DiffusionConfig, TrainConfig
    from ddpm.diffusion import Diffusion
    from ddpm.ema import EMA
    from ddpm.gaussians import draw_gaussian
    from ddpm.images import from_uint8, to_uint8
    from ddpm.kernels import accelerate
    from ddpm.likelihood import BoundTerms, compute_bits_per_dim, compute_rate_distortion
    from ddpm.model import Model, build_model
    from ddpm.networks import NETWORKS, NO_LABEL
    from ddpm.networks.annotated_unet import AnnotatedUNet, ApiUNet
    from ddpm.networks.build import build_network
    from ddpm.networks.config import (
        AnnotatedUNetConfig,
        ApiUNetConfig,
        ContextUNetConfig,
        MHAUNetConfig,
        UNetConfig,
    )
    from ddpm.networks.context_unet import ContextUNet
    from ddpm.networks.mha_unet import MHAUNet
    from ddpm.networks.unet import UNet
    from ddpm.sampler import (
        ReverseStep,
        add_guidance,
        draw_shared_latent,
        explain_few_steps,
        interpolate,
        run_chain,
        run_image_chains,
        sample,
        step_back,
    )  # fmt: skip
    from ddpm.timesteps import ImportanceSampler
    from ddpm.training import TrainState, compute_batch_loss, train_step
else:
    _PARTS = "config networks networks.config networks.build images kernels gaussians sampler likelihood training model"

    def __getattr__(name):
        if name in __all__:
            for module in _PARTS.split():  # those that import no torch stand first
                found = vars(import_module(f"ddpm.{module}"))
                if name in found:
                    return globals().setdefault(name, found[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
