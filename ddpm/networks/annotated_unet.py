"""The U-Nets of the API page and of the annotated walk-through.

Both are the paper's U-Net, except for the layers replaced here; above all they narrow before they upsample.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.networks.config import AnnotatedUNetConfig, ApiUNetConfig
from ddpm.networks.layers import RowDropout2d
from ddpm.networks.unet import ResBlock, UNet


class ApiUNet(UNet):
    """U-Net of the API page, which fixes the settings only; the layers are those of its repository."""

    config: ApiUNetConfig

    def build_block(self, in_channels: int, out_channels: int) -> ResBlock:
        block = super().build_block(in_channels, out_channels)
        block.dropout = RowDropout2d(self.config.dropout)
        return block

    def build_attention(self, width: int) -> nn.Module:
        return WideAttention(width, self.config)

    def build_downsample(self, width: int) -> nn.Module:
        return nn.Conv2d(width, width, 3, stride=2, padding=1)

    def list_up_widths(self, width: int, finer: int) -> list[int]:
        """Return the widths: narrow from the second block on."""
        return [width] + [finer] * self.config.num_res_blocks


class AnnotatedUNet(ApiUNet):
    """U-Net of the annotated walk-through: narrow at the top, wide below, with a bare last convolution."""

    def __init__(
        self, config: AnnotatedUNetConfig, image_size: int, in_channels: int, out_channels: int
    ) -> None:
        super().__init__(config, image_size, in_channels, out_channels)
        del self.norm_out

    def build_block(self, in_channels: int, out_channels: int) -> ResBlock:
        return UNet.build_block(self, in_channels, out_channels)

    def list_up_widths(self, width: int, finer: int) -> list[int]:
        """Return the widths: narrow in the last block."""
        return [width] * self.config.num_res_blocks + [finer]

    def project_output(self, h: Tensor) -> Tensor:
        return self.conv_out(h)


class WideAttention(nn.Module):
    """Self-attention over all pixels whose heads all have the full width C, softmax(q.k / sqrt(C)), residual."""

    def __init__(self, channels: int, config: ApiUNetConfig) -> None:
        super().__init__()
        self.num_heads, self.adds_to_normed = config.num_heads, config.attention_residual == "normed"
        self.norm = nn.GroupNorm(config.norm_groups, channels)
        self.qkv = nn.Linear(channels, 3 * self.num_heads * channels)
        self.proj_out = nn.Linear(self.num_heads * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        pixels = self.qkv(normed.flatten(2).transpose(1, 2))  # (N, H*W, heads * 3C)
        q, k, v = pixels.unflatten(2, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        h = self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (normed if self.adds_to_normed else x) + h.transpose(1, 2).reshape(x.shape)
