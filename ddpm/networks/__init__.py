"""The settings of every network, by its name. Imports no torch; ddpm/networks/build.py builds the trained ones."""

from ddpm.networks import config

NO_LABEL = -1  # in the context of a network that takes labels: an image without one

NETWORKS: dict[str, type[config.NetworkConfig]] = {
    "unet": config.UNetConfig,
    "context_unet": config.ContextUNetConfig,
    "mha_unet": config.MHAUNetConfig,
    "exact": config.ExactConfig,
    "annotated_unet": config.AnnotatedUNetConfig,
    "api_unet": config.ApiUNetConfig,
}
TAKES_LABELS = frozenset({"context_unet"})  # they are built with num_classes and T as their last arguments
UNTRAINED = frozenset({"exact"})  # what it knows is the training images themselves
