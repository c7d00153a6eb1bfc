"""Every network by name, as (config class, network class). All are called `net(x_t, t, context=None)`."""

from typing import Any

import torch
from torch import nn

from ddpm.unet import UNet, UNetConfig

NETWORKS: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, UNet),
}


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
    if num_classes:
        raise ValueError(f"model.name={config.name} takes no labels: set data.labels=false")
    with torch.device("meta"):
        net = network_class(config, image_size, in_channels, out_channels)
    if torch.device(device).type == "meta":
        return net
    net.to_empty(device="cpu")
    net.reset_parameters(torch.Generator().manual_seed(seed))
    return net.to(device)
