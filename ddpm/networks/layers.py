"""The first draw of weights that networks share."""

import torch
from torch import nn

from ddpm.networks.unet import NEAR_ZERO_GAIN

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


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
