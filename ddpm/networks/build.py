"""From the settings of a network to the network."""

from importlib import import_module

import torch
from torch import nn

from ddpm.networks import NETWORKS, TAKES_LABELS
from ddpm.networks.config import NetworkConfig


def build_network(
    config: NetworkConfig,
    image_size: int,
    in_channels: int,
    out_channels: int,
    seed: int,
    num_classes: int = 0,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Build the network that `config` describes; its weights depend on `seed` alone.

    Weights are drawn on the CPU, so they are the same for every device, and torch's global generator is left
    as it was. On device "meta" nothing is drawn.

    Raises ValueError for settings that do not fit the images, and for classes the network cannot take.
    """
    entry = NETWORKS[config.name]
    if num_classes and not entry.takes_labels:
        able = " or ".join(sorted(TAKES_LABELS))
        raise ValueError(f"model.name={config.name} takes no labels: set data.labels=0, or model.name={able}")
    network_class = getattr(import_module(entry.module), entry.network)
    classes = (num_classes,) if entry.takes_labels else ()
    with torch.device("meta"):
        net = network_class(config, image_size, in_channels, out_channels, *classes)
    if torch.device(device).type == "meta":
        return net
    net.to_empty(device="cpu")
    net.reset_parameters(torch.Generator().manual_seed(seed))
    return net.to(device)
