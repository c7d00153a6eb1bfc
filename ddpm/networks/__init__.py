"""The settings of every network, by its name. Imports no torch; ddpm/networks/build.py builds the networks."""

from ddpm.networks.config import ContextUNetConfig, MHAUNetConfig, NetworkConfig, UNetConfig

NO_LABEL = -1  # in the context of a network that takes labels: an image without one

NETWORKS: dict[str, type[NetworkConfig]] = {
    "unet": UNetConfig,
    "context_unet": ContextUNetConfig,
    "mha_unet": MHAUNetConfig,
}
TAKES_LABELS = frozenset({"context_unet"})  # they are built with num_classes as their last argument
