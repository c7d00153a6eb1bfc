"""Faster versions of the layers of the U-Net."""

from importlib.util import find_spec
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.kernels import cuda
from ddpm.kernels.cpu import apply_linear, attend, convolve, group_norm
from ddpm.kernels.cuda import FastGroupNorm, FastLayerNorm, FastRowDropout
from ddpm.networks import unet
from ddpm.networks.layers import RowDropout

Net = TypeVar("Net", bound=nn.Module)


def accelerate(net: Net) -> Net:
    """Replace layers of a network by faster versions, in place; weights stay, results differ only by rounding."""
    replace_classes(net, FASTER)
    if isinstance(net, FastUNet) and net.config.fused and find_spec("triton"):
        from ddpm.kernels.fused import fuse

        fuse(net)
    return net


def replace_classes(net: nn.Module, others: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Give each layer of a network, in place, the other class that its own has there."""
    for module in net.modules():
        module.__class__ = others.get(type(module), type(module))


class FastUNet(unet.UNet):
    def project_output(self, h: Tensor) -> Tensor:
        return self.conv_out(group_norm(self.norm_out, h, swish=True))


class FastResBlock(unet.ResBlock):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = convolve(self.conv1, group_norm(self.norm1, x, swish=True))
        h = h + self.time_proj(temb)[:, :, None, None]
        h = convolve(self.conv2, self.dropout(group_norm(self.norm2, h, swish=True)))
        return self.shortcut(x) + h


class FastAttention(unet.SelfAttention):
    def normalise(self, x: Tensor) -> Tensor:
        return group_norm(self.norm, x, swish=False)

    def forward(self, x: Tensor) -> Tensor:
        normed, layers = self.normalise(x), (self.q, self.k, self.v)
        if cuda.is_on_cuda(normed):  # one product for all three; a CPU gains nothing by it
            weight, bias = torch.cat([f.weight for f in layers]), torch.cat([f.bias for f in layers])
            parts = F.conv2d(normed, weight[:, :, None, None], bias).chunk(3, dim=1)
        else:
            parts = tuple(apply_linear(f, normed) for f in layers)
        # (N, C, H, W) -> (N, H*W, C), without a copy in channels_last
        h = attend(*(part.flatten(2).transpose(1, 2) for part in parts)).transpose(1, 2)
        return x + apply_linear(self.proj_out, h.unflatten(2, x.shape[2:]))


class FastUpsample(unet.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, cuda.upsample(x))


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: FastGroupNorm,
    nn.LayerNorm: FastLayerNorm,
    RowDropout: FastRowDropout,
    unet.UNet: FastUNet,
    unet.ResBlock: FastResBlock,
    unet.SelfAttention: FastAttention,
    unet.Upsample: FastUpsample,
}
