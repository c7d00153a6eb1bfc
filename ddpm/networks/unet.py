"""The paper's U-Net (Appendix B, Section 4; details from the authors' code)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.kernels.cpu import attend, conv3x3, dropout, group_norm, pointwise
from ddpm.networks.config import UNetConfig

NORM_EPS = 1e-6  # authors' code; PyTorch's default is 1e-5
NEAR_ZERO_GAIN = 1e-5  # authors' code: variance scale 1e-10, small but not zero
NEAR_ZERO_LAYERS = ("conv2", "proj_out", "conv_out")  # the last layer of each residual branch, and of the net
Modules = list[nn.Module]


class UNet(nn.Module):
    """eps_theta(x_t, t): residual blocks on several resolutions, joined by skip connections.

    `image_size` decides only which levels have attention. Weights are drawn at construction from torch's
    global generator; `reset_parameters` draws them again from a given one.

    Raises ValueError when `config.problems(image_size)` is not empty.
    """

    def __init__(self, config: UNetConfig, image_size: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if problems := config.problems(image_size):
            raise ValueError("; ".join(f"{key} {message}" for key, message in problems))
        self.config = config
        width, groups = config.channels, config.norm_groups
        self.time_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down, skip_widths = _encoder(config, image_size)
        self.middle = Middle(config.widths[-1], config)
        self.up = _decoder(config, image_size, skip_widths)
        self.norm_out = nn.GroupNorm(groups, config.widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(config.widths[0], out_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Xavier-uniform weights and zero biases; the layers in NEAR_ZERO_LAYERS get gain 1e-5.

        Authors' code: variance scaling, fan_avg, uniform, with scale 1 or 1e-10.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                gain = NEAR_ZERO_GAIN if name.split(".")[-1] in NEAR_ZERO_LAYERS else 1.0
                nn.init.xavier_uniform_(module.weight, gain, generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict from a noised image.

        x_t: float32 (N, in_channels, H, W); t: int64 (N,) in 0..T-1, used raw; context must be None.
        Returns float32 (N, out_channels, H, W), also under autocast.
        """
        if context is not None:
            raise ValueError("the unet takes no labels: use context_unet, or leave data.labels off")
        # The swish before every block's projection is the same tensor, so it is taken once.
        temb = F.silu(self.time_mlp(timestep_embedding(t, self.config.channels)))
        h = self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            h = level(h, temb, skips)
        h = self.middle(h, temb)
        for level in self.up:
            h = level(h, temb, skips)
        return self.conv_out(group_norm(self.norm_out, h, swish=True)).float()


class DownLevel(nn.Module):
    """Residual blocks of one resolution, each with its attention if any, then downsampling if any."""

    def __init__(self, blocks: Modules, attentions: Modules, downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(blocks), nn.ModuleList(attentions)
        self.downsample = downsample

    def forward(self, h: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        """Append every output to `skips`, the downsampled one too."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(h, temb))
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(h)
            skips.append(h)
        return h


class UpLevel(nn.Module):
    """Residual blocks of one resolution, each taking one skip, then upsampling if any."""

    def __init__(self, blocks: Modules, attentions: Modules, upsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(blocks), nn.ModuleList(attentions)
        self.upsample = upsample

    def forward(self, h: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        """Pop one skip per block, last in first out, and join it behind h."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(torch.cat([h, skips.pop()], dim=1), temb))
        return h if self.upsample is None else self.upsample(h)


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.block1 = ResBlock(width, width, config)
        self.attention = Attention(width, config.norm_groups)
        self.block2 = ResBlock(width, width, config)

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(h, temb)), temb)


class ResBlock(nn.Module):
    """x + conv(dropout(swish(norm(conv(swish(norm(x))) + projected temb)))), with no 1/sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(4 * config.channels, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same_width = in_channels == out_channels
        self.shortcut = nn.Identity() if same_width else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = (
            conv3x3(self.conv1, group_norm(self.norm1, x, swish=True))
            + self.time_proj(temb)[:, :, None, None]
        )
        h = conv3x3(self.conv2, dropout(self.dropout, group_norm(self.norm2, h, swish=True)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over all pixels: one head over all channels, softmax(q.k / sqrt(C)), residual."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, NORM_EPS)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        normed = group_norm(self.norm, x, swish=False)
        # (N, C, H, W) -> (N, H*W, C), without a copy in channels_last
        q, k, v = (pointwise(f, normed).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = attend(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + pointwise(self.proj_out, h)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded on the right and bottom only (TensorFlow's SAME)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(self.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TransposedUpsample(nn.Module):
    """Double the side by a 4x4 transposed convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of t (N,) -> float32 (N, width): all sines, then all cosines (authors' code).

    Frequencies 10000^(-i / (half-1)), i = 0..half-1, half = width / 2.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    angle = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _attention(width: int, resolution: int, config: UNetConfig) -> nn.Module:
    wanted = resolution in config.attention_resolutions
    return Attention(width, config.norm_groups) if wanted else nn.Identity()


def _encoder(config: UNetConfig, image_size: int) -> tuple[nn.ModuleList, list[int]]:
    """The levels, finest first, and the width of every skip in the order in which they are pushed."""
    levels, skip_widths = nn.ModuleList(), [config.channels]
    for width, resolution in zip(config.widths, config.resolutions(image_size), strict=True):
        blocks: Modules = []
        for _ in range(config.num_res_blocks):
            blocks.append(ResBlock(skip_widths[-1], width, config))
            skip_widths.append(width)
        attentions = [_attention(width, resolution, config) for _ in blocks]
        coarsest = len(levels) == len(config.widths) - 1
        levels.append(DownLevel(blocks, attentions, None if coarsest else Downsample(width)))
        if not coarsest:
            skip_widths.append(width)
    return levels, skip_widths


def _decoder(config: UNetConfig, image_size: int, skip_widths: list[int]) -> nn.ModuleList:
    """The levels, coarsest first; each has one block more than the encoder's, for the downsampled skip."""
    upsample = {"conv": Upsample, "transposed": TransposedUpsample}[config.resample]
    skip_widths, levels = list(skip_widths), nn.ModuleList()
    in_width = config.widths[-1]
    coarse_to_fine = list(zip(config.widths, config.resolutions(image_size), strict=True))[::-1]
    for width, resolution in coarse_to_fine:
        blocks: Modules = []
        for _ in range(config.num_res_blocks + 1):
            blocks.append(ResBlock(in_width + skip_widths.pop(), width, config))
            in_width = width
        attentions = [_attention(width, resolution, config) for _ in blocks]
        finest = len(levels) == len(config.widths) - 1
        levels.append(UpLevel(blocks, attentions, None if finest else upsample(width)))
    return levels
