"""The layers of the U-Net by faster routes. Other networks stay as they are."""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.kernels.cpu import attend, conv3x3, dropout, group_norm, pointwise
from ddpm.networks import unet

Net = TypeVar("Net", bound=nn.Module)


def accelerate(net: Net) -> Net:
    """Give each layer of `net` its faster route, in place: same names, same tensors, same results up to rounding."""
    for module in net.modules():
        module.__class__ = FASTER.get(type(module), type(module))
    return net


class FastUNet(unet.UNet):
    def head(self, h: Tensor) -> Tensor:
        return self.conv_out(group_norm(self.norm_out, h, swish=True)).float()


class FastResBlock(unet.ResBlock):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = (
            conv3x3(self.conv1, group_norm(self.norm1, x, swish=True))
            + self.time_proj(temb)[:, :, None, None]
        )
        h = conv3x3(self.conv2, dropout(self.dropout, group_norm(self.norm2, h, swish=True)))
        return self.shortcut(x) + h


class FastAttention(unet.Attention):
    def forward(self, x: Tensor) -> Tensor:
        normed = group_norm(self.norm, x, swish=False)
        # (N, C, H, W) -> (N, H*W, C), without a copy in channels_last
        q, k, v = (pointwise(f, normed).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = attend(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + pointwise(self.proj_out, h)


class FastUpsample(unet.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(self.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    unet.UNet: FastUNet,
    unet.ResBlock: FastResBlock,
    unet.Attention: FastAttention,
    unet.Upsample: FastUpsample,
}
