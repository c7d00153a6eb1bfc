"""Winograd's 3x3 convolutions F(m x m, 3 x 3), for CPUs (Lavin and Gray 2016, Sec. 4).

A tile of m x m outputs depends on (m+2) x (m+2) inputs. In the basis of the matrices below, the convolution of a tile
is an element-wise product, summed over channels: (m+2)^2 multiplications for m^2 outputs instead of 9 m^2. For all
tiles of all images that is a matrix product for each of the (m+2)^2 places: y = A^T [ sum_c (G w G^T) * (B^T x B) ] A.
Relative to float64, float32 errs by 2e-6 with m = 4 (6e-7 without Winograd), bf16 by 7e-3 with m = 2 (3e-3), and its
gradients by 7e-3, that of w by up to 1e-2 in a channel. Small batches do without it (`ddpm.kernels.cpu`), so rounding
depends on the number of images of a call.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Matrix = tuple[tuple[float, ...], ...]


class Basis(NamedTuple):
    """Winograd's matrices for output tiles of m x m pixels (Lavin and Gray 2016).

    inputs: B^T, (m+2, m+2); weights: G, (m+2, 3); outputs: A^T, (m, m+2).
    """

    inputs: Matrix
    weights: Matrix
    outputs: Matrix

    @property
    def m(self) -> int:
        return len(self.outputs)

    @property
    def n(self) -> int:
        return len(self.inputs)


F2 = Basis(
    inputs=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    weights=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    outputs=((1, 1, 1, 0), (0, 1, -1, -1)),
)
F4 = Basis(
    inputs=(
        (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
    ),
    weights=(
        (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
    ),
    outputs=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)  # fmt: skip

CHUNK = 4096  # pixels at a time: products of a size that is fast, tiles that the cache holds


def choose_basis(x: Tensor) -> Basis | None:
    """Return the largest basis for x (N, C, H, W): F4 in float32, F2 in bf16; None where its tiles do not fit."""
    basis = {torch.float32: F4, torch.bfloat16: F2}.get(x.dtype)
    return basis if basis and not (x.shape[2] % basis.m or x.shape[3] % basis.m) else None


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, basis: Basis) -> Tensor:
    """Compute F.conv2d(x, weight, bias, padding=1) up to rounding, in the dtype of x; sides: multiples of basis.m.

    x: float32 or bf16 (N, C, H, W); weight: float32 (K, C, 3, 3); bias: float32 (K,). Differentiable once.
    Returns (N, K, H, W) in channels_last. Raises ValueError for other shapes.
    """
    whole = x.ndim == 4 and not (x.shape[2] % basis.m or x.shape[3] % basis.m)
    if not whole or weight.shape[1:] != (x.shape[1], 3, 3) or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"x, weight, bias of shapes {shapes} are no 3x3 convolution in tiles of {basis.m}")
    return _Conv3x3.apply(x, weight, bias, basis)


class _Conv3x3(torch.autograd.Function):
    """Convolution that keeps x only; the backward pass computes the tiles, several times as large, again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, basis: Basis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.basis = basis
        kernel = _transform_weight(weight, basis, x.dtype)
        return _convolve_tiles(x, kernel.transpose(1, 2), basis, bias)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_x = _convolve_tiles(d_y, _transform_weight(weight.flip(2, 3), ctx.basis, x.dtype), ctx.basis)
        d_bias = d_y.sum((0, 2, 3), dtype=torch.float32)
        return d_x, _compute_weight_gradient(x, d_y, ctx.basis), d_bias, None


def _convolve_tiles(x: Tensor, kernel: Tensor, basis: Basis, bias: Tensor | None = None) -> Tensor:
    """Convolve x (N, C, H, W) with the kernel's tiles (n * n, C, K) -> (N, K, H, W) in channels_last."""
    count, channels, height, width = x.shape
    m, n, out_channels = basis.m, basis.n, kernel.shape[2]
    result = x.new_empty(count, height, width, out_channels)
    for some, into in _split_batch(x.permute(0, 2, 3, 1), result):
        tiles = _transform_input(some, basis)
        products = torch.bmm(tiles.view(n * n, -1, channels), kernel).view(*tiles.shape[:-1], out_channels)
        if bias is not None:
            products[1, 1] += bias.to(x.dtype)  # goes to every output: the second column of A^T holds ones
        rows = x.new_empty(m, *products.shape[1:])
        _compute_weighted_sums(basis.outputs, products, rows)
        tiled = into.view(-1, height // m, m, width // m, m, out_channels)
        _compute_weighted_sums(basis.outputs, rows.transpose(0, 1), tiled.permute(4, 2, 0, 1, 3, 5))
    return result.permute(0, 3, 1, 2)


def _compute_weight_gradient(x: Tensor, d_y: Tensor, basis: Basis) -> Tensor:
    """Return d weight, float32 (K, C, 3, 3): G^T [ sum over tiles of (A d_y A^T) (B^T x B) ] G."""
    channels, out_channels, n = x.shape[1], d_y.shape[1], basis.n
    total = torch.zeros(n * n, out_channels, channels)
    for some, d_some in _split_batch(x.permute(0, 2, 3, 1), d_y.permute(0, 2, 3, 1)):
        tiles = _transform_input(some, basis).view(n * n, -1, channels)
        d_tiles = _transform_tiles(tuple(zip(*basis.outputs, strict=True)), d_some, basis.m)  # the adjoint's
        d_products = d_tiles.view(n * n, -1, out_channels).transpose(1, 2)
        if x.dtype == total.dtype:  # else the sum over chunks would be rounded to bf16
            total.baddbmm_(d_products, tiles)
        else:
            total += torch.bmm(d_products, tiles)
    weight = _compute_weight_transform(basis).T @ total.flatten(1)
    return weight.view(3, 3, out_channels, channels).permute(2, 3, 0, 1)


def _split_batch(*images: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Yield the tensors in chunks of a few images, (N', H, W, C)."""
    size = max(1, CHUNK // (images[0].shape[1] * images[0].shape[2]))
    return zip(*(one.split(size) for one in images), strict=True)


def _transform_input(x: Tensor, basis: Basis) -> Tensor:
    """Compute B^T x B of each tile: (N, H, W, C) -> (n, n, N, H/m, W/m, C), tile positions first."""
    count, height, width, channels = x.shape
    padded = x.new_zeros(count, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x
    return _transform_tiles(basis.inputs, padded, basis.m)


def _transform_tiles(matrix: Matrix, x: Tensor, m: int) -> Tensor:
    """Compute M x M^T of each tile of x (N, H, W, C); a tile starts every m pixels."""
    n, (count, height, width, channels) = len(matrix), x.shape
    starts = range(len(matrix[0]))
    down, across = ((side - len(starts)) // m + 1 for side in (height, width))
    columns = x.new_empty(n, count, height, across, channels)
    _compute_weighted_sums(matrix, [x[:, :, j : j + m * across : m] for j in starts], columns)
    tiles = x.new_empty(n, n, count, down, across, channels)
    _compute_weighted_sums(matrix, [columns[:, :, i : i + m * down : m] for i in starts], tiles)
    return tiles


def _transform_weight(weight: Tensor, basis: Basis, dtype: torch.dtype) -> Tensor:
    """Compute G w G^T: (K, C, 3, 3) -> (n * n, K, C) of dtype, tile positions first."""
    by_place = weight.permute(0, 2, 3, 1).flatten(1, 2)  # (K, 9, C), without a copy in channels_last
    tiles = (_compute_weight_transform(basis) @ by_place).transpose(0, 1)
    return tiles.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _compute_weight_transform(basis: Basis) -> Tensor:
    """Return the Kronecker product of G with itself, (n * n, 9)."""
    g = torch.tensor(basis.weights)
    return torch.einsum("iy,jx->ijyx", g, g).reshape(basis.n**2, 9)


def _compute_weighted_sums(matrix: Matrix, parts: Sequence[Tensor] | Tensor, into: Tensor) -> None:
    """Compute into[i] = sum_j matrix[i][j] parts[j], skipping the zeros of the matrix."""
    for row, result in zip(matrix, into, strict=True):
        terms = [(factor, part) for factor, part in zip(row, parts, strict=True) if factor]
        terms.sort(key=lambda term: term[0] != 1)
        (factor, first), *others = terms
        if factor != 1 or not others:
            torch.mul(first, factor, out=result)
            first = result
        for factor, part in others:
            torch.add(first, part, alpha=factor, out=result)
            first = result
