"""What the convolutional networks of this folder have in common: levels of halving size, and their first draw."""

import torch
from torch import nn

from ddpm.unet import NEAR_ZERO_GAIN

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def level_problems(channels: int, channel_mult: tuple[int, ...], image_size: int) -> list[tuple[str, str]]:
    """What keeps a network of these widths from images of this side: (key, message) pairs."""
    found = []
    if channels < 4 or channels % 2:
        found.append(("channels", f"must be even and at least 4, not {channels}"))
    if len(channel_mult) < 2 or min(channel_mult) < 1:
        found.append(
            ("channel_mult", "must hold one multiplier of at least 1 for each of two or more levels")
        )
    levels = len(channel_mult)
    factor = 2 ** max(levels - 1, 0)
    if image_size < 1 or image_size % factor:
        message = f"has {levels} levels, which need an image size divisible by {factor}, not {image_size}"
        found.append(("channel_mult", message))
    return found


def draw_weights(net: nn.Module, generator: torch.Generator | None) -> None:
    """As in the paper's network: Xavier-uniform weights, zero biases, a first output near zero.

    The last layer of `net` is its `conv_out`; norms start as the identity.
    """
    for module in net.modules():
        if isinstance(module, NORMS):
            module.reset_parameters()  # running statistics and their counter too
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            gain = NEAR_ZERO_GAIN if module is net.conv_out else 1.0
            nn.init.xavier_uniform_(module.weight, gain, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
