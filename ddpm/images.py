"""Pixels and model values: the only place where images change unit."""

import torch
from torch import Tensor


def from_uint8(x: Tensor) -> Tensor:
    """Turn uint8 grey levels 0..255 into float32 in [-1, 1] (paper, Sec. 3.3), any shape."""
    if x.dtype != torch.uint8:
        raise TypeError(f"from_uint8 expects uint8 pixels, got {x.dtype}")
    return x.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Turn floats in [-1, 1] into uint8, rounded to the nearest level; values outside the range are clamped."""
    if not x.is_floating_point():
        raise TypeError(f"to_uint8 expects floating-point values in [-1, 1], got {x.dtype}")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int, scale: int = 1) -> Tensor:
    """Tile uint8 (N,C,H,W) images row by row into one uint8 (H',W',3) picture, two pixels apart on white.

    `scale` repeats each pixel, for images too small to be seen; the last row may be short.
    """
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    n, c, h, w = images.shape
    rows = -(-n // columns)
    tiles = images.new_full((rows * columns, 3, h + 2, w + 2), 255)
    tiles[:n, :, 1:-1, 1:-1] = images.expand(n, 3, h, w) if c == 1 else images
    return tiles.reshape(rows, columns, 3, h + 2, w + 2).permute(0, 3, 1, 4, 2).reshape(rows * (h + 2), -1, 3)
