"""Denoising diffusion probabilistic models: the mathematics and the networks, usable without the pipeline.

Names are resolved when they are first used, so that a program that reads configurations only imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_WHERE = {
    name: f"ddpm.{module}"
    for module, names in {
        "config": "DiffusionConfig TrainConfig",
        "diffusion": "Diffusion",
        "ema": "EMA",
        "kernels": "accelerate",
        "images": "from_uint8 to_uint8",
        "likelihood": "Likelihood bits_per_dim rate_distortion",
        "networks": "NETWORKS NO_LABEL",
        "networks.build": "build_network",
        "networks.config": "ContextUNetConfig MHAUNetConfig UNetConfig",
        "networks.context_unet": "ContextUNet",
        "networks.mha_unet": "MHAUNet",
        "networks.unet": "UNet",
        "sampler": "Step ancestral ddim draw_shared_latent guide interpolate reverse sample warn_of_few_steps",
        "timesteps": "ImportanceSampler",
        "training": "TrainState train_step",
    }.items()
    for name in names.split()
}

if TYPE_CHECKING:
    from ddpm.config import DiffusionConfig as DiffusionConfig
    from ddpm.config import TrainConfig as TrainConfig
    from ddpm.diffusion import Diffusion as Diffusion
    from ddpm.ema import EMA as EMA
    from ddpm.images import from_uint8 as from_uint8
    from ddpm.images import to_uint8 as to_uint8
    from ddpm.kernels import accelerate as accelerate
    from ddpm.likelihood import Likelihood as Likelihood
    from ddpm.likelihood import bits_per_dim as bits_per_dim
    from ddpm.likelihood import rate_distortion as rate_distortion
    from ddpm.networks import NETWORKS as NETWORKS
    from ddpm.networks import NO_LABEL as NO_LABEL
    from ddpm.networks.build import build_network as build_network
    from ddpm.networks.config import ContextUNetConfig as ContextUNetConfig
    from ddpm.networks.config import MHAUNetConfig as MHAUNetConfig
    from ddpm.networks.config import UNetConfig as UNetConfig
    from ddpm.networks.context_unet import ContextUNet as ContextUNet
    from ddpm.networks.mha_unet import MHAUNet as MHAUNet
    from ddpm.networks.unet import UNet as UNet
    from ddpm.sampler import Step as Step
    from ddpm.sampler import ancestral as ancestral
    from ddpm.sampler import ddim as ddim
    from ddpm.sampler import draw_shared_latent as draw_shared_latent
    from ddpm.sampler import guide as guide
    from ddpm.sampler import interpolate as interpolate
    from ddpm.sampler import reverse as reverse
    from ddpm.sampler import sample as sample
    from ddpm.sampler import warn_of_few_steps as warn_of_few_steps
    from ddpm.timesteps import ImportanceSampler as ImportanceSampler
    from ddpm.training import TrainState as TrainState
    from ddpm.training import train_step as train_step
else:

    def __getattr__(name):
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_WHERE[name]), name)
        return value
