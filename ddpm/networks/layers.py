"""Parts that all networks use: initial weights, the embedding of t, shortcuts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddpm.networks import NO_LABEL
from ddpm.networks.config import NetworkConfig

NEAR_ZERO_GAIN = 1e-5  # authors' code: variance scale 1e-10, small but not zero
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class SeededNetwork(nn.Module):
    """Base class of the networks: net(x_t, t, context) predicts eps, x_0, v or the mean for x_t.

    x_t: (N, in_channels, H, W) in the type of the weights; t: int64 (N,) in 0..T-1; context: int64 (N,) labels in
    0..num_classes-1, NO_LABEL if there is none, or any float vectors (N, num_classes); None is no label for all.
    Returns (N, out_channels, H, W) in the type of x_t, also under autocast. Weights are drawn at construction, from
    torch's global generator. `near_zero` names layers whose weights are so small that they pass almost nothing at
    first. Raises ValueError for what `config.find_problems(image_size)` finds.
    """

    near_zero: ClassVar[tuple[str, ...]] = ("conv_out",)

    def __init__(self, config: NetworkConfig, image_size: int) -> None:
        super().__init__()
        if problems := config.find_problems(image_size):
            raise ValueError("; ".join(f"{key} {message}" for key, message in problems))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new Xavier-uniform weights (gain 1e-5 in the layers of `near_zero`); reset biases and norms.

        Authors' code: variance scaling, fan_avg, uniform, with scale 1 or 1e-10.
        """
        for name, module in self.named_modules():
            if isinstance(module, NORMS):
                module.reset_parameters()  # running statistics and their counter too
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                gain = NEAR_ZERO_GAIN if name.split(".")[-1] in self.near_zero else 1.0
                nn.init.xavier_uniform_(module.weight, gain, generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class RowDropout(nn.Dropout):
    """Dropout that draws the mask of an image from the keys of this image, not from torch's seed and the whole batch.

    keys: int32 (2, N, 1), set before each forward pass of training; None: torch's own dropout. p is rounded to a
    multiple of 2**-16. Each 32-bit word decides on two neighbouring channels of a pixel: the sum of a counter and the
    first key, hashed by Wellons' lowbias32, into which the second key is mixed.
    """

    keys: Tensor | None = None

    @property
    def dropped(self) -> int:
        """Number of dropped values among 2**16."""
        return min(round(self.p * 2**16), 2**16 - 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.keys is None or not self.training:
            return super().forward(x)
        kept = draw_kept(self.keys, x[0].numel(), self.dropped)
        factor = torch.where(kept, x.new_full((), 2**16 / (2**16 - self.dropped)), 0.0)
        return x * view_as_images(factor, x)


def draw_kept(keys: Tensor, size: int, dropped: int) -> Tensor:
    """Draw a mask of the values that are kept in an image, bool (..., N, size), from keys (2, ..., N, 1)."""
    first, second = keys
    word = torch.arange(-(-size // 2), dtype=torch.int32, device=keys.device) + first
    word = torch.add(second, _fold_half(word), alpha=0x7FEB352D)
    word ^= (word >> 15).bitwise_and_(2**17 - 1)  # >> of int32 fills in the sign
    word = _fold_half(torch.add(second, word, alpha=0x846CA68B - 2**32))
    return word.view(torch.int16)[..., :size] >= dropped - 2**15


def view_as_images(values: Tensor, x: Tensor) -> Tensor:
    """View values (N, C*H*W), in the memory order of channels_last, in the shape of x (N, C, H, W)."""
    return values.view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _fold_half(word: Tensor) -> Tensor:
    """Compute word ^ (word >>> 16) of int32 (..., W) in place: XOR the upper half into the lower one."""
    halves = word.view(torch.int16).unflatten(-1, (-1, 2))
    halves[..., 0].bitwise_xor_(halves[..., 1])
    return word


class RowDropout2d(RowDropout):
    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(torch.ones_like(x[:, :, :1, :1]))


@contextmanager
def set_dropout_keys(layers: list[RowDropout], keys: Tensor) -> Iterator[None]:
    """Set the keys of the layers inside the context, int32 (len(layers), 2, N, 1); afterwards they have none."""
    for layer, layer_keys in zip(layers, keys, strict=True):
        layer.keys = layer_keys
    try:
        yield
    finally:
        for layer in layers:
            layer.keys = None


def embed_timesteps(t: Tensor, width: int, dtype: torch.dtype = torch.float, endpoint: bool = True) -> Tensor:
    """Embed t (N,) in sinusoids: (N, width) of dtype, all sines, then all cosines (authors' code).

    Frequencies 10000^(-i / (half-1)), i = 0..half-1, half = width / 2; without endpoint 10000^(-i / half).
    """
    half = width // 2
    exponent = torch.arange(half, dtype=dtype, device=t.device) / (half - 1 if endpoint else half)
    angle = t.to(dtype)[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def encode_context(context: Tensor | None, t: Tensor, num_classes: int) -> Tensor:
    """Return vectors unchanged, and labels as one-hot rows, float (N, num_classes); zeros for NO_LABEL."""
    if context is None:
        return torch.zeros(len(t), num_classes, device=t.device)
    if not num_classes:
        raise ValueError("this network was built without classes: set data.labels to their number")
    shape = (len(t), num_classes)
    if context.is_floating_point() and context.shape == shape:
        return context
    if context.is_floating_point() or context.shape != t.shape:
        raise ValueError(
            f"context has shape {tuple(context.shape)}; one label per image is {tuple(t.shape)}, a float vector "
            f"per image {shape}"
        )
    unknown = (context != NO_LABEL) & ((context < 0) | (context >= num_classes))
    if context.device.type == "cpu" and unknown.any():
        raise ValueError(
            f"context has the label {context[unknown][0]}; this network knows 0 to {num_classes - 1}, "
            f"and {NO_LABEL} for none"
        )
    return (context[:, None] == torch.arange(num_classes, device=t.device)).float()


def build_shortcut(in_channels: int, out_channels: int) -> nn.Module:
    """Return the skip path of a residual block: identity, or a 1x1 convolution if the width changes."""
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
