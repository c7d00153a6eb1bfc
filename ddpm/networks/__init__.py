"""The settings of every network, by its name. Imports no torch; ddpm/networks/build.py builds the trained ones."""

from ddpm.networks import config, custom

LABELLED = "model.class_conditional=true, model.name=context_unet"  # networks that take labels
NO_LABEL = -1  # label of an image without one, where the network takes labels

NETWORKS: dict[str, type[config.NetworkConfig]] = {
    "unet": config.UNetConfig,
    "context_unet": config.ContextUNetConfig,
    "mha_unet": config.MHAUNetConfig,
    "exact": config.ExactConfig,
    "annotated_unet": config.AnnotatedUNetConfig,
    "api_unet": config.ApiUNetConfig,
}
UNTRAINED = frozenset({"exact"})  # it knows only the training images themselves


def find_config_class(name: str) -> type[config.NetworkConfig]:
    """Find the settings class of a network by its name; `package.module:Class` names a custom network.

    Raises KeyError for a name that is unknown, and ValueError for a class that cannot be used, with the reason.
    """
    return custom.make_config_class(name) if ":" in name else NETWORKS[name]
