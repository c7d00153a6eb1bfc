"""Triton kernels of the U-Net for CUDA, layout NHWC: sum with the embedding, group norm, swish and dropout in one
kernel each way; and the sum that ends a residual branch, with the biases of its convolutions.

A program of the first kernel works on one image and on as many whole groups as have COLUMNS channels. It goes over
the pixels once for the sums and once for the result, and should find them in the L2 cache then. Sums are float32 and
have one order, so results repeat bit by bit. The mask is `draw_kept`'s, drawn again on the way back instead of being
kept.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ddpm.kernels import FastAttention, FastResBlock, FastUNet, replace_classes
from ddpm.kernels.cuda import is_on_cuda
from ddpm.networks.layers import RowDropout

# The tile of the norm: channels, and pixels each way, which were the fastest of 14 shapes on an H100, summed over ten
# sizes of x. STRIPE: pixels that a program adds up for the gradient of a bias. BLOCK: numbers that a program adds.
COLUMNS, PIXELS, PIXELS_BACK = 32, 128, 64
STRIPE, BLOCK = 512, 4096


def fuse(net: nn.Module) -> None:
    """Let an accelerated U-Net use these kernels, in place."""
    replace_classes(net, FUSED)


class FusedUNet(FastUNet):
    def project_output(self, h: Tensor) -> Tensor:
        return self.conv_out(activate(self.norm_out, h)) if can_fuse(h) else super().project_output(h)


class FusedResBlock(FastResBlock):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        drops = self.dropout.training and self.dropout.p > 0
        if not can_fuse(x) or (drops and self.dropout.keys is None):
            return super().forward(x, temb)
        h = F.conv2d(activate(self.norm1, x), self.conv1.weight, padding=1)
        added = self.time_proj(temb) + self.conv1.bias
        h = activate(self.norm2, h, added, self.dropout if drops else None)
        h, bias = F.conv2d(h, self.conv2.weight, padding=1), self.conv2.bias
        if isinstance(self.shortcut, nn.Conv2d):
            x, bias = F.conv2d(x, self.shortcut.weight), bias + self.shortcut.bias  # type: ignore[operator]
        return add_branch(x, h, bias)


class FusedAttention(FastAttention):
    def normalise(self, x: Tensor) -> Tensor:
        return activate(self.norm, x, swish=False) if can_fuse(x) else super().normalise(x)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    FastUNet: FusedUNet,
    FastResBlock: FusedResBlock,
    FastAttention: FusedAttention,
}


def can_fuse(x: Tensor) -> bool:
    """Return whether the kernels run on x; torch.compile makes its own."""
    return is_on_cuda(x) and not torch.compiler.is_compiling()


def activate(
    norm: nn.GroupNorm, x: Tensor, temb: Tensor | None = None, dropout: RowDropout | None = None, swish: bool = True
) -> Tensor:  # fmt: skip
    """Compute dropout(silu(norm(x + temb))) in the type of x; x (N, C, H, W), temb (N, C) or None."""
    keys = dropout.keys if dropout else None
    return activate_norm(
        x.contiguous(memory_format=torch.channels_last), temb, norm.weight, norm.bias,
        None if keys is None else keys.flatten(1), norm.num_groups, norm.eps, dropout.dropped if dropout else 0, swish,
    )[0]  # fmt: skip


@torch.library.custom_op("ddpm::activate_norm", mutates_args=())
def activate_norm(
    x: Tensor, temb: Tensor | None, weight: Tensor, bias: Tensor, keys: Tensor | None, groups: int, eps: float,
    dropped: int, swish: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the result, and for each image and channel the mean and 1 / standard deviation, float32 (N, C).

    keys: int32 (2, N), those of `RowDropout`; None drops nothing.
    """
    y = torch.empty_like(x)
    mean, scale = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    grid, shape = _divide(x, groups, swish, PIXELS)
    _activate[grid](x, temb, weight, bias, keys, y, mean, scale, *_list_strides(keys), eps, dropped, **shape)
    return y, mean, scale


@activate_norm.register_fake
def _(x, temb, weight, bias, keys, groups, eps, dropped, swish):
    return torch.empty_like(x), *(x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("ddpm::activate_norm_backward", mutates_args=())
def activate_norm_backward(
    gradient: Tensor, x: Tensor, temb: Tensor | None, weight: Tensor, bias: Tensor, keys: Tensor | None, mean: Tensor,
    scale: Tensor, groups: int, dropped: int, swish: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of x, and those of weight, bias and temb of each image alone, float32 (3, N, C)."""
    dx, sums = torch.empty_like(x), x.new_empty(3, *x.shape[:2], dtype=torch.float32)
    grid, shape = _divide(x, groups, swish, PIXELS_BACK)
    _differentiate[grid](
        gradient, x, temb, weight, bias, keys, mean, scale, dx, sums, len(x), *_list_strides(keys), dropped, **shape
    )  # fmt: skip
    return dx, sums


@activate_norm_backward.register_fake
def _(gradient, x, temb, weight, bias, keys, mean, scale, groups, dropped, swish):
    return torch.empty_like(x), x.new_empty(3, *x.shape[:2], dtype=torch.float32)


def _keep(ctx, inputs, output):
    *tensors, ctx.groups, _, ctx.dropped, ctx.swish = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _go_back(ctx, gradient, *_):
    x, temb, weight, bias, keys, mean, scale = ctx.saved_tensors
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    dx, sums = activate_norm_backward(
        gradient, x, temb, weight, bias, keys, mean, scale, ctx.groups, ctx.dropped, ctx.swish
    )
    of_weight, of_bias = sums[:2].sum(1).to(weight.dtype)
    return (
        dx,
        None if temb is None else sums[2].to(temb.dtype),
        of_weight,
        of_bias,
        None,
        None,
        None,
        None,
        None,
    )


activate_norm.register_autograd(_go_back, setup_context=_keep)


def _list_strides(keys: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if keys is None else keys.stride()


def _divide(x: Tensor, groups: int, swish: bool, pixels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid, and the constants of the kernels for x (N, C, H, W)."""
    channels, size = x.shape[1] // groups, x.shape[2] * x.shape[3]
    padded = triton.next_power_of_2(channels)
    together = max(1, COLUMNS // padded)
    rows = min(pixels, triton.next_power_of_2(size), max(1, COLUMNS * pixels // (together * padded)))
    shape = {
        "P": size, "GROUPS": groups, "CHANNELS": channels, "PADDED": padded, "TOGETHER": together,
        "ROWS": rows, "SWISH": swish,
    }  # fmt: skip
    return (len(x), triton.cdiv(groups, together)), shape


@torch.library.custom_op("ddpm::add_branch", mutates_args=())
def add_branch(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """Compute x + h + bias in the type of h; x and h (N, C, H, W), bias (C,)."""
    x, h = (part.contiguous(memory_format=torch.channels_last) for part in (x, h))
    y = torch.empty_like(h)
    _add_branch[triton.cdiv(y.numel(), BLOCK),](x, h, bias, y, y.numel(), C=y.shape[1], BLOCK=BLOCK)
    return y


@add_branch.register_fake
def _(x, h, bias):
    return torch.empty_like(h, memory_format=torch.channels_last)


@torch.library.custom_op("ddpm::sum_pixels", mutates_args=())
def sum_pixels(x: Tensor) -> Tensor:
    """Return the sums of x (N, C, H, W), dense in channels_last, over stripes of its pixels, float32 (stripes, C)."""
    pixels, channels = x.numel() // x.shape[1], x.shape[1]
    sums = x.new_empty(triton.cdiv(pixels, STRIPE), channels, dtype=torch.float32)
    grid = len(sums), triton.cdiv(channels, COLUMNS)
    _sum_stripe[grid](x, sums, pixels, C=channels, COLUMNS=COLUMNS, ROWS=PIXELS, STRIPE=STRIPE)
    return sums


@sum_pixels.register_fake
def _(x):
    return x.new_empty(-(-x.numel() // x.shape[1] // STRIPE), x.shape[1], dtype=torch.float32)


def _go_back_from_sum(ctx, gradient):
    # Both branches take it as it is: a part of a joined gradient is copied once, not by each.
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    return gradient, gradient, sum_pixels(gradient).sum(0).to(ctx.dtype)


def _keep_type(ctx, inputs, output):
    ctx.dtype = inputs[2].dtype


add_branch.register_autograd(_go_back_from_sum, setup_context=_keep_type)


@triton.jit
def _add_branch(x, h, bias, y, size, C: tl.constexpr, BLOCK: tl.constexpr):
    first, number = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    place, channel = first + number, ((first % C).to(tl.int32) + number) % C
    inside = place < size
    added = tl.load(bias + channel, inside, 0).to(tl.float32) + tl.load(x + place, inside, 0)
    tl.store(y + place, added + tl.load(h + place, inside, 0), inside)


@triton.jit
def _sum_stripe(
    x, sums, pixels, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STRIPE: tl.constexpr
):
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for row in tl.static_range(0, STRIPE, ROWS):
        pixel = tl.program_id(0).to(tl.int64) * STRIPE + row + tl.arange(0, ROWS)
        inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
        total += tl.sum(tl.load(x + pixel[:, None] * C + channel[None, :], inside, 0).to(tl.float32), axis=0)
    tl.store(sums + tl.program_id(0) * C + channel, total, channel < C)


@triton.jit
def _find_columns(GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr):
    """Return the channels of this program, and which of its columns have one."""
    column = tl.arange(0, TOGETHER * PADDED)
    group, place = tl.program_id(1) * TOGETHER + column // PADDED, column % PADDED
    return group * CHANNELS + place, (place < CHANNELS) & (group < GROUPS)


@triton.jit
def _load_tile(x, row, channel, exists, P: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    """Return the numbers of ROWS pixels of this image, their places in it, and which of them exist."""
    pixel = row + tl.arange(0, ROWS)
    place = pixel[:, None] * C + channel[None, :]
    inside = (pixel < P)[:, None] & exists[None, :]
    return tl.load(x + tl.program_id(0).to(tl.int64) * P * C + place, inside, 0).to(tl.float32), place, inside


@triton.jit
def _average(total, number, PADDED: tl.constexpr, TOGETHER: tl.constexpr):
    """Sum the columns of each group, divide, and give every column the result of its group."""
    sums = tl.sum(total.reshape(TOGETHER, PADDED), axis=1) / number
    return tl.broadcast_to(sums[:, None], (TOGETHER, PADDED)).reshape(TOGETHER * PADDED)


@triton.jit
def _is_kept(keys, key, row, place, dropped):
    """Return `draw_kept`'s mask for numbers of this image, counted in the order of memory; key, row: strides."""
    first = tl.load(keys + tl.program_id(0) * row).to(tl.uint32, bitcast=True)
    second = tl.load(keys + key + tl.program_id(0) * row).to(tl.uint32, bitcast=True)
    word = (place >> 1).to(tl.uint32) + first
    word = (word ^ (word >> 16)) * 0x7FEB352D + second
    word = (word ^ (word >> 15)) * 0x846CA68B + second
    word = word ^ (word >> 16)
    half = (word >> ((place & 1) * 16).to(tl.uint32)) & 0xFFFF
    return (half ^ 0x8000).to(tl.int32) >= dropped


@triton.jit
def _activate(
    x, temb, weight, bias, keys, y, means, scales, key, row_stride, eps, dropped, P: tl.constexpr, GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr,
    SWISH: tl.constexpr,
):  # fmt: skip
    channel, exists = _find_columns(GROUPS, CHANNELS, PADDED, TOGETHER)
    C: tl.constexpr = GROUPS * CHANNELS
    image = tl.program_id(0).to(tl.int64)
    added = tl.zeros((TOGETHER * PADDED,), tl.float32)
    if temb is not None:
        added = tl.load(temb + image * C + channel, exists, 0).to(tl.float32)
    # Sums of differences from the first pixel, which is near the mean, lose no digits to a large mean.
    pivot = _average(tl.load(x + image * P * C + channel, exists, 0) + added, CHANNELS, PADDED, TOGETHER)
    sums = tl.zeros((TOGETHER * PADDED,), tl.float32)
    squares = tl.zeros((TOGETHER * PADDED,), tl.float32)
    for row in range(0, P, ROWS):
        h, place, inside = _load_tile(x, row, channel, exists, P, C, ROWS)
        off = tl.where(inside, h + (added - pivot)[None, :], 0)
        sums += tl.sum(off, axis=0)
        squares += tl.sum(off * off, axis=0)
    off_mean = _average(sums, P * CHANNELS, PADDED, TOGETHER)
    mean = pivot + off_mean
    variance = _average(squares, P * CHANNELS, PADDED, TOGETHER) - off_mean * off_mean
    scale = 1 / tl.sqrt(tl.maximum(variance, 0) + eps)
    tl.store(means + image * C + channel, mean, exists)
    tl.store(scales + image * C + channel, scale, exists)
    gain = tl.load(weight + channel, exists, 0).to(tl.float32)
    shift = tl.load(bias + channel, exists, 0).to(tl.float32)
    for row in range(0, P, ROWS):
        h, place, inside = _load_tile(x, row, channel, exists, P, C, ROWS)
        z = (h + (added - mean)[None, :]) * scale[None, :] * gain[None, :] + shift[None, :]
        if SWISH:
            z = z * tl.sigmoid(z)
        if keys is not None:
            z = tl.where(
                _is_kept(keys, key, row_stride, place, dropped), z * (65536.0 / (65536 - dropped)), 0
            )
        tl.store(y + image * P * C + place, z, inside)


@triton.jit
def _differentiate(
    gradient, x, temb, weight, bias, keys, means, scales, dx, sums, N, key, row_stride, dropped, P: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr,
    SWISH: tl.constexpr,
):  # fmt: skip
    channel, exists = _find_columns(GROUPS, CHANNELS, PADDED, TOGETHER)
    C: tl.constexpr = GROUPS * CHANNELS
    image = tl.program_id(0).to(tl.int64)
    off = -tl.load(means + image * C + channel, exists, 0)
    if temb is not None:
        off += tl.load(temb + image * C + channel, exists, 0).to(tl.float32)
    scale = tl.load(scales + image * C + channel, exists, 0)
    gain = tl.load(weight + channel, exists, 0).to(tl.float32)
    shift = tl.load(bias + channel, exists, 0).to(tl.float32)
    of_bias = tl.zeros((TOGETHER * PADDED,), tl.float32)
    of_weight = tl.zeros((TOGETHER * PADDED,), tl.float32)
    of_temb = tl.zeros((TOGETHER * PADDED,), tl.float32)
    # Components of the gradient that the norm takes out.
    along_one = tl.zeros((TOGETHER * PADDED,), tl.float32)
    along_x = tl.zeros((TOGETHER * PADDED,), tl.float32)
    for turn in tl.static_range(2):  # first these sums, then the result
        for row in range(0, P, ROWS):
            h, place, inside = _load_tile(x, row, channel, exists, P, C, ROWS)
            dz = tl.load(gradient + image * P * C + place, inside, 0).to(tl.float32)
            if keys is not None:
                dz = tl.where(
                    _is_kept(keys, key, row_stride, place, dropped), dz * (65536.0 / (65536 - dropped)), 0
                )
            normed = tl.where(inside, (h + off[None, :]) * scale[None, :], 0)
            if SWISH:
                z = normed * gain[None, :] + shift[None, :]
                dz *= tl.sigmoid(z) * (1 + z * (1 - tl.sigmoid(z)))
            if turn == 0:
                of_bias += tl.sum(dz, axis=0)
                of_weight += tl.sum(dz * normed, axis=0)
            else:
                d = (dz * gain[None, :] - along_one[None, :] - normed * along_x[None, :]) * scale[None, :]
                of_temb += tl.sum(tl.where(inside, d, 0), axis=0)
                tl.store(dx + image * P * C + place, d, inside)
        if turn == 0:
            along_one = _average(of_bias * gain, P * CHANNELS, PADDED, TOGETHER)
            along_x = _average(of_weight * gain, P * CHANNELS, PADDED, TOGETHER)
    tl.store(sums + image * C + channel, of_weight, exists)
    tl.store(sums + (N + image) * C + channel, of_bias, exists)
    tl.store(sums + (2 * N + image) * C + channel, of_temb, exists)
