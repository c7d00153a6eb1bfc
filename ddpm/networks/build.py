"""Builds a network from its settings."""

from collections.abc import Callable

import torch
from torch import nn

from ddpm.networks import TAKES_LABELS
from ddpm.networks.annotated_unet import AnnotatedUNet, ApiUNet
from ddpm.networks.config import NetworkConfig
from ddpm.networks.context_unet import ContextUNet
from ddpm.networks.layers import SeededNetwork
from ddpm.networks.mha_unet import MHAUNet
from ddpm.networks.unet import UNet

# All are called `net(x_t, t, context=None)`.
CLASSES: dict[str, Callable[..., SeededNetwork]] = {
    "unet": UNet,
    "context_unet": ContextUNet,
    "mha_unet": MHAUNet,
    "annotated_unet": AnnotatedUNet,
    "api_unet": ApiUNet,
}


def build_network(
    config: NetworkConfig,
    image_size: int,
    in_channels: int,
    out_channels: int,
    seed: int,
    num_classes: int = 0,
    device: torch.device | str = "cpu",
    timesteps: int = 1000,
) -> nn.Module:
    """Build the network that `config` describes; its weights depend on `seed` alone.

    Weights are drawn on the CPU, so they are the same for every device, and torch's global generator is left
    as it was. On device "meta" nothing is drawn. timesteps: the T of the diffusion.

    Raises ValueError for settings that do not fit the images, and for classes the network cannot take.
    """
    takes_labels = config.name in TAKES_LABELS
    if num_classes and not takes_labels:
        able = " or ".join(sorted(TAKES_LABELS))
        raise ValueError(f"model.name={config.name} takes no labels: set data.labels=0, or model.name={able}")
    more = (num_classes, timesteps) if takes_labels else ()
    with torch.device("meta"):
        net = CLASSES[config.name](config, image_size, in_channels, out_channels, *more)
    if torch.device(device).type == "meta":
        return net
    net.to_empty(device="cpu")
    net.reset_parameters(torch.Generator().manual_seed(seed))
    return net.to(device)
