"""The settings of every network, by its name. Imports no torch; ddpm/networks/build.py builds the trained ones."""

from ddpm.networks.config import ContextUNetConfig, ExactConfig, MHAUNetConfig, NetworkConfig, UNetConfig

NO_LABEL = -1  # in the context of a network that takes labels: an image without one

NETWORKS: dict[str, type[NetworkConfig]] = {
    "unet": UNetConfig,
    "context_unet": ContextUNetConfig,
    "mha_unet": MHAUNetConfig,
    "exact": ExactConfig,
}
TAKES_LABELS = frozenset({"context_unet"})  # they are built with num_classes as their last argument
UNTRAINED = frozenset({"exact"})  # what it knows is the training images themselves
