"""The U-Net with multi-head attention on every level, of the published 64x64 walk-through.

Its widths at 64x64: 64, 128, 256, 256, a bottleneck of 512, and decoder levels of 128, 64, 64.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.networks.config import MHAUNetConfig
from ddpm.networks.layers import SeededNetwork, embed_timesteps


class MHAUNet(SeededNetwork):
    """eps_theta(x_t, t): double convolutions and self-attention on each level, joined by skip connections."""

    def __init__(self, config: MHAUNetConfig, image_size: int, in_channels: int, out_channels: int) -> None:
        super().__init__(config, image_size)
        self.config = config
        widths, up_widths = config.widths, config.up_widths
        tutorial = config.form == "tutorial"
        self.conv_in = DoubleConv(in_channels, widths[0], widths[0], tutorial)
        self.down = nn.ModuleList(MHADownLevel(fine, coarse, config) for fine, coarse in pairwise(widths))
        wide = 2 * widths[-1]
        self.bottleneck = nn.Sequential(
            DoubleConv(widths[-1], wide, wide, tutorial),
            DoubleConv(wide, wide, wide, tutorial),
            DoubleConv(wide, up_widths[0], up_widths[0], tutorial),
        )
        self.up = nn.ModuleList(MHAUpLevel(coarse, fine, config) for coarse, fine in pairwise(up_widths))
        self.conv_out = nn.Conv2d(up_widths[-1], out_channels, 1)
        self.reset_parameters()

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict as `SeededNetwork` says; t is used raw, and context must be None."""
        if context is not None:
            raise ValueError("the mha_unet takes no labels: use context_unet, or set data.labels=0")
        encoding = embed_timesteps(t, self.config.time_width, x_t.dtype, endpoint=False)
        down_temb = F.relu(encoding) if self.config.form == "document" else F.silu(encoding)
        h = self.conv_in(x_t)
        skips = []
        for down in self.down:
            skips.append(h)
            h = down(h, down_temb)
        h = self.bottleneck(h)
        for up in self.up:
            h = up(h, F.silu(encoding), skips.pop())
        return self.conv_out(h).to(x_t.dtype)


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with GroupNorm over all channels and relu; the tutorial's form: one gelu between."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, is_tutorial: bool) -> None:
        conv1 = nn.Conv2d(in_channels, mid_channels, 3, padding=1, bias=not is_tutorial)
        conv2 = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=not is_tutorial)
        norm1, norm2 = nn.GroupNorm(1, mid_channels), nn.GroupNorm(1, out_channels)
        act1, act2 = (nn.GELU(), nn.Identity()) if is_tutorial else (nn.ReLU(), nn.ReLU())
        layers = {"conv1": conv1, "norm1": norm1, "act1": act1, "conv2": conv2, "norm2": norm2, "act2": act2}
        super().__init__(OrderedDict(layers))


class MHABlock(nn.Module):
    """Double convolution to the new width, time, then attention; the tutorial's form begins with a residual one."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, config: MHAUNetConfig) -> None:
        super().__init__()
        tutorial = config.form == "tutorial"
        mid = mid_channels if tutorial else out_channels
        self.residual = DoubleConv(in_channels, in_channels, in_channels, True) if tutorial else None
        self.conv = DoubleConv(in_channels, mid, out_channels, tutorial)
        self.time_proj = nn.Linear(config.time_width, out_channels)
        self.attention = MultiHeadAttention(out_channels, config.num_heads)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if self.residual is not None:
            x = F.gelu(x + self.residual(x))
        return self.attention(self.conv(x) + self.time_proj(temb)[:, :, None, None])


class MHADownLevel(nn.Module):
    """Max-pooling to half the side, then a block."""

    def __init__(self, in_channels: int, out_channels: int, config: MHAUNetConfig) -> None:
        super().__init__()
        self.block = MHABlock(in_channels, out_channels, out_channels, config)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.block(F.max_pool2d(x, 2), temb)


class MHAUpLevel(nn.Module):
    """Bilinear upsampling to twice the side, concatenation after the skip, then a block."""

    def __init__(self, in_channels: int, out_channels: int, config: MHAUNetConfig) -> None:
        super().__init__()
        self.block = MHABlock(2 * in_channels, in_channels, out_channels, config)

    def forward(self, h: Tensor, temb: Tensor, skip: Tensor) -> Tensor:
        h = F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=True)
        return self.block(torch.cat([skip, h], dim=1), temb)


class MultiHeadAttention(nn.Module):
    """Self-attention over all pixels and a feed-forward, each with its norm inside its residual branch."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # (N, H*W, C)
        pixels = pixels + self._attend(self.norm1(pixels))
        pixels = pixels + self.feed_forward(self.norm2(pixels))
        return pixels.transpose(1, 2).reshape(x.shape)

    def _attend(self, pixels: Tensor) -> Tensor:
        """Compute softmax(q.k / sqrt(C / heads)) v in each head, and join the heads; pixels and result (N, H*W, C)."""
        heads = self.qkv(pixels).unflatten(2, (3, self.num_heads, -1))  # (N, H*W, 3, heads, C/heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, H*W, C/heads)
        return self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
