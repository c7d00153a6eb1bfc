"""The workers that train one network together, as a training step sees them. Imports no torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


class Peers:
    """The workers that share a global batch. This one is alone; a subclass reaches the others."""

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size

    def total(self, value: Tensor) -> Tensor:
        """Sum `value` over the workers."""
        return value

    def no_sync(self, forward: nn.Module) -> AbstractContextManager[None]:
        """Leave the gradients of `forward` on this worker: they are averaged after the last part of a batch only."""
        return nullcontext()
