"""The context U-Net of the published sprite walk-through: a small network that is conditioned by class.

Convolution blocks, a pooled vector in the middle, time that shifts and context that scales.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.networks.config import ContextUNetConfig
from ddpm.networks.layers import SeededNetwork, build_shortcut, encode_context


class ContextUNet(SeededNetwork):
    """Network eps_theta(x_t, t, context); time and class modulate the two coarsest levels on the way up.

    num_classes = 0 makes a network without context. timesteps: T, since t enters as (t + 1) / T.
    """

    def __init__(
        self, config: ContextUNetConfig, image_size: int, in_channels: int, out_channels: int,
        num_classes: int = 0, timesteps: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__(config, image_size)
        self.config, self.num_classes, self.timesteps = config, num_classes, timesteps
        widths = config.widths
        self.conv_in = ContextBlock(in_channels, widths[0], config, residual=True)
        self.down = nn.ModuleList(_build_down_level(*pair, config) for pair in pairwise(widths))
        self.middle = GlobalPool(widths[-1], image_size >> (len(widths) - 1), config.norm_groups)
        self.up = nn.ModuleList(
            ContextUpLevel(coarse, fine, config, Film(num_classes, coarse) if i < 2 else None)
            for i, (coarse, fine) in enumerate(pairwise(widths[::-1]))
        )
        self.head = nn.Sequential(
            nn.Conv2d(2 * widths[0], widths[0], 3, padding=1),
            nn.GroupNorm(config.norm_groups, widths[0]),
            nn.ReLU(),
        )
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self.reset_parameters()

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict as `SeededNetwork` says. Raises ValueError for a context of another shape; on a CPU, also range."""
        time = (t[:, None].to(x_t.dtype) + 1) / self.timesteps
        classes = encode_context(context, t, self.num_classes).to(x_t.dtype)
        h = finest = self.conv_in(x_t)
        skips = []
        for down in self.down:
            h = down(h)
            skips.append(h)
        h = self.middle(h)
        for up in self.up:
            h = up(h, skips.pop(), time, classes)
        return self.conv_out(self.head(torch.cat([h, finest], dim=1))).to(x_t.dtype)


class Film(nn.Module):
    """Modulation scale h + shift (Perez et al. 2018), with scale from the class and shift from the time."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.scale = _build_embedding(num_classes, width) if num_classes else None
        self.shift = _build_embedding(1, width)

    def forward(self, h: Tensor, time: Tensor, classes: Tensor) -> Tensor:
        """Modulate h (N, width, H, W) by time (N, 1) and classes (N, num_classes), zeros for no class."""
        if self.scale is not None:
            h = h * self.scale(classes)[:, :, None, None]
        return h + self.shift(time)[:, :, None, None]


class ContextBlock(nn.Module):
    """Twice gelu(norm(conv)); if residual, the sum with x is divided by 1.414, the document's root of 2."""

    def __init__(
        self, in_channels: int, out_channels: int, config: ContextUNetConfig, residual: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = _build_norm(out_channels, config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = _build_norm(out_channels, config)
        self.shortcut = build_shortcut(in_channels, out_channels) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.norm1(self.conv1(x)))
        h = F.gelu(self.norm2(self.conv2(h)))
        return h if self.shortcut is None else (self.shortcut(x) + h) / 1.414


class ContextUpLevel(nn.Module):
    """Level on the way up: modulation, its skip, twice the side (transposed convolution), then two blocks."""

    def __init__(
        self, in_channels: int, out_channels: int, config: ContextUNetConfig, film: Film | None
    ) -> None:
        super().__init__()
        self.film = film
        self.upsample = nn.ConvTranspose2d(2 * in_channels, out_channels, 2, stride=2)
        self.block1 = ContextBlock(out_channels, out_channels, config)
        self.block2 = ContextBlock(out_channels, out_channels, config)

    def forward(self, h: Tensor, skip: Tensor, time: Tensor, classes: Tensor) -> Tensor:
        h = h if self.film is None else self.film(h, time, classes)
        return self.block2(self.block1(self.upsample(torch.cat([h, skip], dim=1))))


class GlobalPool(nn.Module):
    """Mean over all pixels, expanded again to the same side by a transposed convolution."""

    def __init__(self, width: int, side: int, norm_groups: int) -> None:
        super().__init__()
        self.spread = nn.ConvTranspose2d(width, width, side)
        self.norm = nn.GroupNorm(norm_groups, width)

    def forward(self, h: Tensor) -> Tensor:
        pooled = F.gelu(h.mean(dim=(2, 3), keepdim=True))  # (N, width, 1, 1)
        return F.relu(self.norm(self.spread(pooled)))


def _build_down_level(in_channels: int, out_channels: int, config: ContextUNetConfig) -> nn.Sequential:
    """Build two blocks, then max-pooling to half the side."""
    first, second = (ContextBlock(width, out_channels, config) for width in (in_channels, out_channels))
    return nn.Sequential(OrderedDict(block1=first, block2=second, pool=nn.MaxPool2d(2)))


def _build_norm(width: int, config: ContextUNetConfig) -> nn.Module:
    return nn.BatchNorm2d(width) if config.norm == "batch" else nn.GroupNorm(config.norm_groups, width)


def _build_embedding(in_width: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width))
