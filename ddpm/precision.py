"""The precision of a network, by name, and the settings of torch for it.

fp32: float32, with whole mantissas on a GPU too. tf32: float32, but a GPU multiplies with mantissas of 10 bits. bf16:
products and what lies between them in bfloat16; parameters, gradients and what is outside the network stay float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddpm.config import Precision


@contextmanager
def use_precision(precision: Precision) -> Iterator[None]:
    """Let a GPU multiply float32 in TF32, or forbid it, inside the context: for forward and backward passes."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def use_deterministic(deterministic: bool) -> Iterator[None]:
    """Use deterministic algorithms inside the context; if false, those that a GPU measures as the fastest."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return torch's autocast context for a forward pass; it casts to bfloat16 if the precision is bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class PreciseNetwork(nn.Module):
    """Network that computes in one precision; its output has the type of x_t in any case."""

    def __init__(self, net: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.net, self.precision = net, precision

    def forward(self, x_t: Tensor, *args: Tensor | None) -> Tensor:
        with use_precision(self.precision), autocast(self.precision, x_t.device):
            output: Tensor = self.net(x_t, *args)
        return output
