"""Construction of networks from their settings."""

from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor, nn

from ddpm.networks import LABELLED, NO_LABEL
from ddpm.networks.annotated_unet import AnnotatedUNet, ApiUNet
from ddpm.networks.config import NetworkConfig
from ddpm.networks.context_unet import ContextUNet
from ddpm.networks.custom import GIVEN, CustomConfig
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
    config: NetworkConfig, image_size: int, in_channels: int, out_channels: int, seed: int,
    num_classes: int = 0, device: torch.device | str = "cpu", timesteps: int = 1000,
) -> nn.Module:  # fmt: skip
    """Build the network that `config` describes; its weights depend on `seed` alone, and are drawn on the CPU.

    On device "meta" nothing is drawn; a custom network is built on the CPU then, since it may hold constants that
    no checkpoint has. timesteps: the T of the diffusion. Raises ValueError for settings that do not fit.
    """
    if num_classes and not config.takes_labels:
        raise ValueError(
            f"model.name={config.name} takes no labels: set data.labels=0, or another network ({LABELLED})"
        )
    given = dict(zip(GIVEN, (image_size, in_channels, out_channels, num_classes, timesteps), strict=True))
    if isinstance(config, CustomConfig):
        net = _build_custom(config, seed, given)
        return net if torch.device(device).type == "meta" else net.to(device)
    with torch.device("meta"):
        net = CLASSES[config.name](config, **_choose_arguments(CLASSES[config.name], given))
    if torch.device(device).type == "meta":
        return net
    net.to_empty(device="cpu")
    net.reset_parameters(torch.Generator().manual_seed(seed))
    return net.to(device)


def _choose_arguments(network: Callable[..., nn.Module], given: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in given.items() if key in signature(network).parameters}


def _build_custom(config: CustomConfig, seed: int, given: dict[str, int]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = config.network(**_choose_arguments(config.network, given), **config.settings)
    if reset := getattr(net, "reset_parameters", None):
        reset(torch.Generator().manual_seed(seed))
    return net


def allocate_weights(net: nn.Module, device: torch.device | str) -> nn.Module:
    """Allocate memory on a device for a network that was built on "meta"; its weights must then be loaded."""
    is_empty = any(tensor.is_meta for tensor in net.state_dict().values())
    return net.to_empty(device=device) if is_empty else net.to(device)


def check_network(net: nn.Module, shape: tuple[int, int, int], out_channels: int, takes_labels: bool) -> None:
    """Raise ValueError unless a network (on the CPU) can be trained and saved, and fits images of this shape."""
    if not isinstance(net, nn.Module) or not any(p.requires_grad and p.numel() for p in net.parameters()):
        raise ValueError("it is no torch.nn.Module with weights to train")
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    if others := net.state_dict().keys() - own.keys():
        reason = "second names of other weights, or no tensors: give each weight one name"
        raise ValueError(f"its state_dict has {', '.join(sorted(others))}, {reason}")
    x_t, t, wanted = torch.ones(2, *shape), torch.tensor([0, 1]), (2, out_channels, *shape[1:])
    for context in (None, torch.tensor([0, NO_LABEL])) if takes_labels else (None,):
        output = net.eval()(x_t, t, context)
        found = (tuple(output.shape), output.dtype) if isinstance(output, Tensor) else type(output).__name__
        if found != (wanted, torch.float32):
            raise ValueError(f"its output for x_t {(2, *shape)} is {found}, not {(wanted, torch.float32)}")
        if not output.requires_grad:
            raise ValueError("its output has no gradient: it does not depend on the weights")
        if not bool((x_t == 1).all()):
            raise ValueError("it changes its argument x_t, which is used again after the call")
