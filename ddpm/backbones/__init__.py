"""Every network by name, as (config class, network class). All are called `net(x_t, t, context=None)`."""

from typing import Any

import torch
from torch import nn

from ddpm.backbones.context_unet import ContextUNet, ContextUNetConfig
from ddpm.backbones.mha_unet import MHAUNet, MHAUNetConfig
from ddpm.unet import UNet, UNetConfig

NETWORKS: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, UNet),
    "context_unet": (ContextUNetConfig, ContextUNet),
    "mha_unet": (MHAUNetConfig, MHAUNet),
}
TAKES_LABELS = frozenset({"context_unet"})  # networks whose last argument is num_classes


def build_network(
    config: Any,
    image_size: int,
    in_channels: int,
    out_channels: int,
    seed: int,
    num_classes: int = 0,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The network that `config` (one of NETWORKS' configs) describes; its weights depend on `seed` alone.

    Weights are drawn on the CPU, so they are the same for every device, and torch's global generator is left
    as it was. On device "meta" nothing is drawn.

    Raises ValueError for settings that do not fit the images, and for classes the network cannot take.
    """
    _, network_class = NETWORKS[config.name]
    if num_classes and config.name not in TAKES_LABELS:
        able = " or ".join(sorted(TAKES_LABELS))
        raise ValueError(f"model.name={config.name} takes no labels: set data.labels=0, or model.name={able}")
    classes = (num_classes,) if config.name in TAKES_LABELS else ()
    with torch.device("meta"):
        net = network_class(config, image_size, in_channels, out_channels, *classes)
    if torch.device(device).type == "meta":
        return net
    net.to_empty(device="cpu")
    net.reset_parameters(torch.Generator().manual_seed(seed))
    return net.to(device)


def has_batch_norm(net: nn.Module) -> bool:
    """Whether what it computes in training depends on which images share a worker's batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
