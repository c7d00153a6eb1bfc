"""Every network by name. All are called `net(x_t, t, context=None)`. Imports no torch until one is built."""

from dataclasses import dataclass

from ddpm.networks.config import ContextUNetConfig, MHAUNetConfig, NetworkConfig, UNetConfig

NO_LABEL = -1  # in the context of a network that takes labels: an image without one


@dataclass(frozen=True)
class NetworkEntry:
    """A network: its settings, and where its class is found. `takes_labels`: its last argument is num_classes."""

    config: type[NetworkConfig]
    module: str
    network: str
    takes_labels: bool = False


NETWORKS = {
    "unet": NetworkEntry(UNetConfig, "ddpm.networks.unet", "UNet"),
    "context_unet": NetworkEntry(
        ContextUNetConfig, "ddpm.networks.context_unet", "ContextUNet", takes_labels=True
    ),
    "mha_unet": NetworkEntry(MHAUNetConfig, "ddpm.networks.mha_unet", "MHAUNet"),
}
TAKES_LABELS = frozenset(name for name, entry in NETWORKS.items() if entry.takes_labels)
