"""Conversion between pixels 0..255 and model values in [-1, 1]."""

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
