"""The paper's U-Net (Appendix B, Section 4; details from the authors' code)."""

from collections import OrderedDict
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm.networks.config import ApiUNetConfig, UNetConfig
from ddpm.networks.layers import RowDropout, SeededNetwork, build_shortcut, embed_timesteps, encode_context

swish = F.silu


class UNet(SeededNetwork):
    """eps_theta(x_t, t): residual blocks on several resolutions, joined by skip connections.

    `image_size` decides only which levels have attention. The U-Nets that differ in some layers replace `build_*`.
    """

    # The last layer of each residual branch, and of the net.
    near_zero: ClassVar[tuple[str, ...]] = ("conv2", "proj_out", "conv_out")

    def __init__(
        self, config: UNetConfig | ApiUNetConfig, image_size: int, in_channels: int, out_channels: int,
        num_classes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(config, image_size)
        self.config, width = config, config.widths[0]
        levels = list(zip(config.widths, config.list_attending(image_size), strict=True))
        self.time_mlp = nn.Sequential(
            nn.Linear(config.pos_dim, config.emb_dim), nn.SiLU(), nn.Linear(config.emb_dim, config.emb_dim)
        )
        self.num_classes = num_classes
        self.label_emb = nn.Linear(num_classes, config.emb_dim, bias=False) if config.takes_labels else None
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [width]  # the width of every skip, in the order in which they are pushed
        for i, (width, attends) in enumerate(levels):
            widths = [skips[-1]] + [width] * config.num_res_blocks
            is_coarsest = i == len(levels) - 1
            level = DownLevel(*self._build_layers(widths[:-1], widths[1:], attends))
            level.downsample = None if is_coarsest else self.build_downsample(width)
            self.down.append(level)
            skips += widths[1:] if is_coarsest else [*widths[1:], width]
        self.middle = nn.ModuleDict(
            {
                "block1": self.build_block(width, width),
                "attention": self.build_attention(width),
                "block2": self.build_block(width, width),
            }
        )
        self.up = nn.ModuleList()
        for i, (level_width, attends) in reversed(list(enumerate(levels))):
            # One block more than on the way down, for the skip that was downsampled.
            widths = [width, *self.list_up_widths(level_width, config.widths[max(i - 1, 0)])]
            in_widths, width = [inner + skips.pop() for inner in widths[:-1]], widths[-1]
            self.up.append(UpLevel(*self._build_layers(in_widths, widths[1:], attends)))
            self.up[-1].upsample = self.build_upsample(width) if i else nn.Identity()
        for level in [*self.down[: config.recompute], *self.up[::-1][: config.recompute]]:
            level.recomputes = True
        self.norm_out = nn.GroupNorm(config.norm_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self.reset_parameters()

    def _build_layers(
        self, in_widths: list[int], widths: list[int], attends: bool
    ) -> tuple[list["ResBlock"], list[nn.Module]]:
        """Build the blocks of a level and the attention after each."""
        blocks = [self.build_block(*pair) for pair in zip(in_widths, widths, strict=True)]
        return blocks, [self.build_attention(width) if attends else nn.Identity() for width in widths]

    def build_block(self, in_channels: int, out_channels: int) -> "ResBlock":
        return ResBlock(in_channels, out_channels, self.config)

    def build_attention(self, width: int) -> nn.Module:
        return SelfAttention(width, self.config.norm_groups)

    def build_downsample(self, width: int) -> nn.Module:
        """Build the layer that halves the side; it pads on the right and bottom only (TensorFlow's SAME)."""
        pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)
        return nn.Sequential(OrderedDict(pad=pad, conv=conv))

    def build_upsample(self, width: int) -> nn.Module:
        if self.config.resample == "conv":
            return Upsample(width)
        return nn.Sequential(OrderedDict(conv=nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)))

    def list_up_widths(self, width: int, finer: int) -> list[int]:
        """Return the output width of each block of a level on the way up; `finer` is the next level's."""
        return [width] * (self.config.num_res_blocks + 1)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict as `SeededNetwork` says; t is used raw, and a context needs class_conditional."""
        temb = self.time_mlp(embed_timesteps(t, self.config.pos_dim, x_t.dtype))
        if self.label_emb is not None:
            temb = temb + self.label_emb(encode_context(context, t, self.num_classes).to(x_t.dtype))
        elif context is not None:
            raise ValueError("this unet takes no labels: use model.class_conditional, or set data.labels=0")
        temb = swish(temb)  # the same tensor before every block's projection, so it is taken once
        h = self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            h = level(h, temb, skips)
        h = self.middle["attention"](self.middle["block1"](h, temb))
        h = self.middle["block2"](h, temb)
        for level in self.up:
            h = level(h, temb, skips)
        return self.project_output(h).to(x_t.dtype)

    def project_output(self, h: Tensor) -> Tensor:
        """Return conv(swish(norm(h))), (N, out_channels, H, W)."""
        return self.conv_out(swish(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if the resolution has it, and resampling."""

    recomputes = False  # on the way back, from the inputs of its blocks

    def __init__(self, blocks: list["ResBlock"], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(blocks), nn.ModuleList(attentions)

    def run_block(self, block: nn.Module, attention: nn.Module, x: Tensor, temb: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(lambda *inputs: attention(block(*inputs)), x, temb, use_reentrant=False)
        return attention(block(x, temb))


class DownLevel(Level):
    """Level on the way down: its blocks, then downsampling; the coarsest has none."""

    downsample: nn.Module | None

    def forward(self, h: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        """Run the blocks and append each output to `skips`, the downsampled one too."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = self.run_block(block, attention, h, temb)
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(h)
            skips.append(h)
        return h


class UpLevel(Level):
    """Level on the way up: its blocks, each of which takes one skip, then upsampling; the finest has none."""

    upsample: nn.Module

    def forward(self, h: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        """Run the blocks; each takes the last skip and concatenates it after the channels of h."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = self.run_block(block, attention, torch.cat([h, skips.pop()], dim=1), temb)
        return self.upsample(h)


class ResBlock(nn.Module):
    """Residual block: twice norm, swish and 3x3 convolution; the time is added between them. The sum is not scaled."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig | ApiUNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(config.emb_dim, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, config.norm_eps)
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
        self.norm = nn.GroupNorm(norm_groups, channels, UNetConfig.norm_eps)
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
