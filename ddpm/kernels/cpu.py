"""Layers of the U-Net that are faster than those of torch on a CPU; elsewhere the plain layers, equal up to rounding.

In bf16 torch is slow at group norm of groups of fewer than 16 channels, and at fused attention. Small products go at
half the speed of a 1x1 convolution, 3x3 convolutions make several times the multiplications that they need. Figures:
docs/performance.md. Plain products round the scores of attention to bf16: relative to float64 the result errs by 4e-3
where q and k have a standard deviation of 1, by 1e-2 where it is 3; that of fused attention by 2e-3 in both cases.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.kernels import winograd
from ddpm.kernels.cuda import attend_on_cuda

CACHED = 2**17  # float32 numbers that stay in a core's cache between two passes
NARROW_GROUP = 16  # channels of a group below which torch's bf16 kernel is not vectorised,
WIDE_IMAGE = 1024  # except in its forward pass over images of this number of pixels
LONG_SEQUENCE = 1024  # pixels above which attention weights are not held in memory
WIDE_CONV = 128  # channels in and out from which fewer multiplications outweigh the transforms
MANY_PIXELS = 1024  # pixels of all images from which they outweigh the transform of the weights too
LARGE_IMAGE = 16  # side above which they do in bf16, whose tiles are smaller; not on matrix units


def group_norm(norm: nn.GroupNorm, x: Tensor, swish: bool) -> Tensor:
    """Compute norm(x), or silu(norm(x)) with swish; x (N, C, H, W)."""
    narrow = norm.num_channels // norm.num_groups < NARROW_GROUP
    is_slow = narrow and (torch.is_grad_enabled() or x.shape[2] * x.shape[3] < WIDE_IMAGE)
    if not _is_bf16_on_cpu(x) or not is_slow or not norm.affine:
        return F.silu(norm(x)) if swish else norm(x)
    return _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, swish)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(C)) v; each (N, L, C)."""
    if q.device.type == "cuda" and q.dtype != torch.float64 and not torch.compiler.is_compiling():
        return attend_on_cuda(q, k, v)
    if not _is_bf16_on_cpu(q) or q.shape[1] > LONG_SEQUENCE:
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return ((q * q.shape[2] ** -0.5) @ k.transpose(1, 2)).softmax(dim=2) @ v


def apply_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply `linear` to the channels of every pixel of x (N, C, H, W), as a 1x1 convolution."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Compute layer(x), by Winograd where that is faster: 3x3, stride 1, padding 1 of zeros, with bias."""
    shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
    is_plain = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and x.ndim == 4
    basis, bias = _choose_layer_basis(layer, x) if is_plain else None, layer.bias
    return layer(x) if basis is None or bias is None else winograd.conv3x3(x, layer.weight, bias, basis)


def _is_bf16_on_cpu(x: Tensor) -> bool:
    """Return whether x is bf16 on a CPU, outside of torch.compile, which makes its own kernels."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _choose_layer_basis(layer: nn.Conv2d, x: Tensor) -> winograd.Basis | None:
    """Return the Winograd basis for this layer; None where the plain convolution is faster."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or layer.weight.dtype != torch.float32:
        return None
    count, _, height, width = x.shape
    if min(layer.weight.shape[:2]) < WIDE_CONV or count * height * width < MANY_PIXELS:
        return None
    if x.dtype == torch.bfloat16:
        pays = height >= LARGE_IMAGE and not torch.cpu._is_amx_tile_supported()
    else:
        pays = not torch.is_autocast_enabled("cpu")
    return winograd.choose_basis(x) if pays else None


class _GroupNorm(torch.autograd.Function):
    """GroupNorm, with silu if asked, of a bf16 x: in float32, on as many images at a time as the cache holds.

    Keeps x and the statistics only; the normalised values are computed again on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, swish: bool
    ) -> Tensor:
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        size = max(1, CACHED // (channels * pixels))
        result, means, rstds = torch.empty_like(x), [], []
        for some, into in zip(x.split(size), result.split(size), strict=True):
            y, mean, rstd = torch.native_group_norm(
                some.float(), weight, bias, len(some), channels, pixels, groups, eps
            )
            into.copy_(F.silu(y, inplace=True) if swish else y)
            means.append(mean)
            rstds.append(rstd)
        ctx.save_for_backward(x, weight, bias, torch.cat(means), torch.cat(rstds))
        ctx.groups, ctx.size, ctx.swish = groups, size, swish
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, means, rstds = ctx.saved_tensors
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        d_x, d_weight, d_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
        parts = (tensor.split(ctx.size) for tensor in (x, gradient, means, rstds, d_x))
        for some, d_y, mean, rstd, into in zip(*parts, strict=True):
            some, d_y = some.float(), d_y.float()
            if ctx.swish:
                per_channel = channels // ctx.groups
                scale = rstd.repeat_interleave(per_channel, 1) * weight
                shift = bias - mean.repeat_interleave(per_channel, 1) * scale
                y = torch.addcmul(shift[:, :, None, None], some, scale[:, :, None, None])
                d_y = torch.ops.aten.silu_backward(d_y, y)
            d_some, d_weights, d_biases = torch.ops.aten.native_group_norm_backward(
                d_y, some, mean, rstd, weight, len(some), channels, pixels, ctx.groups, [True] * 3
            )
            into.copy_(d_some)
            d_weight += d_weights
            d_bias += d_biases
        return d_x, d_weight, d_bias, None, None, None
