"""The paper's U-Net (Appendix B, Section 4; details from the authors' code)."""

from collections import OrderedDict
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.networks.config import UNetConfig
from ddpm.networks.layers import RowDropout, SeededNetwork, build_shortcut, embed_timesteps

NORM_EPS = 1e-6  # authors' code; PyTorch's default is 1e-5
swish = F.silu


class UNet(SeededNetwork):
    """eps_theta(x_t, t): residual blocks on several resolutions, joined by skip connections.

    `image_size` decides only which levels have attention.
    """

    # The last layer of each residual branch, and of the net.
    near_zero: ClassVar[tuple[str, ...]] = ("conv2", "proj_out", "conv_out")

    def __init__(self, config: UNetConfig, image_size: int, in_channels: int, out_channels: int) -> None:
        super().__init__(config, image_size)
        self.config = config
        width, blocks = config.channels, config.num_res_blocks
        levels = list(zip(config.widths, config.list_sides(image_size), strict=True))
        self.time_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [width]  # the width of every skip, in the order in which they are pushed
        for i, (width, side) in enumerate(levels):
            is_coarsest = i == len(levels) - 1
            in_widths = [skips[-1]] + [width] * (blocks - 1)
            self.down.append(DownLevel(in_widths, width, side, is_coarsest, config))
            skips += [width] * (blocks if is_coarsest else blocks + 1)
        self.middle = Middle(width, config)
        self.up = nn.ModuleList()
        for i, (out_width, side) in reversed(list(enumerate(levels))):
            # One block more than on the way down, for the skip that was downsampled.
            in_widths = [(out_width if n else width) + skips.pop() for n in range(blocks + 1)]
            self.up.append(UpLevel(in_widths, out_width, side, i == 0, config))
            width = out_width
        self.norm_out = nn.GroupNorm(config.norm_groups, width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self.reset_parameters()

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict eps, x_0 or the mean for x_t.

        x_t: (N, in_channels, H, W) in the type of the weights; t: int64 (N,) in 0..T-1, used raw; context: None.
        Returns (N, out_channels, H, W) in the type of x_t, also under autocast.
        """
        if context is not None:
            raise ValueError("the unet takes no labels: use context_unet, or leave data.labels off")
        # The swish before every block's projection is the same tensor, so it is taken once.
        temb = swish(self.time_mlp(embed_timesteps(t, self.config.channels, x_t.dtype)))
        h = self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            h = level(h, temb, skips)
        h = self.middle(h, temb)
        for level in self.up:
            h = level(h, temb, skips)
        return self.project_output(h).to(x_t.dtype)

    def project_output(self, h: Tensor) -> Tensor:
        """Return conv(swish(norm(h))), (N, out_channels, H, W)."""
        return self.conv_out(swish(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the resolution has it."""

    def __init__(self, in_widths: list[int], width: int, side: int, config: UNetConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(in_width, width, config) for in_width in in_widths)
        attends = side in config.attention_resolutions
        self.attentions = nn.ModuleList(
            SelfAttention(width, config.norm_groups) if attends else nn.Identity() for _ in in_widths
        )


class DownLevel(Level):
    """Level on the way down: its blocks, then downsampling; the coarsest has none."""

    def __init__(
        self, in_widths: list[int], width: int, side: int, is_coarsest: bool, config: UNetConfig
    ) -> None:
        super().__init__(in_widths, width, side, config)
        self.downsample = None
        if not is_coarsest:  # padded on the right and bottom only (TensorFlow's SAME)
            pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)
            self.downsample = nn.Sequential(OrderedDict(pad=pad, conv=conv))

    def forward(self, h: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        """Run the blocks and append each output to `skips`, the downsampled one too."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(h, temb))
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(h)
            skips.append(h)
        return h


class UpLevel(Level):
    """Level on the way up: its blocks, each of which takes one skip, then upsampling; the finest has none."""

    def __init__(
        self, in_widths: list[int], width: int, side: int, is_finest: bool, config: UNetConfig
    ) -> None:
        super().__init__(in_widths, width, side, config)
        self.upsample: nn.Module = nn.Identity()
        if not is_finest and config.resample == "conv":
            self.upsample = Upsample(width)
        elif not is_finest:
            conv = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
            self.upsample = nn.Sequential(OrderedDict(conv=conv))

    def forward(self, h: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        """Run the blocks; each takes the last skip and concatenates it after the channels of h."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(torch.cat([h, skips.pop()], dim=1), temb))
        return self.upsample(h)


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.block1 = ResBlock(width, width, config)
        self.attention = SelfAttention(width, config.norm_groups)
        self.block2 = ResBlock(width, width, config)

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(h, temb)), temb)


class ResBlock(nn.Module):
    """Residual block: twice norm, swish and 3x3 convolution; the time is added between them. No 1/sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(4 * config.channels, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, NORM_EPS)
        self.dropout = RowDropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = build_shortcut(in_channels, out_channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x))) + self.time_proj(temb)[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return self.shortcut(x) + h


class SelfAttention(nn.Module):
    """Self-attention over all pixels: one head over all channels, softmax(q.k / sqrt(C)), residual."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, NORM_EPS)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (N, H*W, C)
        h = F.scaled_dot_product_attention(self.q(pixels), self.k(pixels), self.v(pixels))
        return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)


class Upsample(nn.Module):
    """Upsampling to twice the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
