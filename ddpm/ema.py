"""Exponential moving average of a network's parameters (paper, Appendix B: decay 0.9999)."""

import torch
from torch import Tensor, nn


class EMA:
    """Averaged weights, float32, in the layout of `net.state_dict()`; buffers are copied, not averaged.

    So BatchNorm's running statistics are those of the raw weights. decay is constant, as in the authors' code; with
    warmup it is min(decay, (1 + n) / (10 + n)) at update n, for runs short against the average's half-life (6,931 steps
    at 0.9999).
    """

    def __init__(self, net: nn.Module, decay: float, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self.parameters = {name: p.detach().float().clone() for name, p in net.named_parameters()}
        persistent = net.state_dict().keys()
        self.buffers = {name: b.clone() for name, b in net.named_buffers() if name in persistent}

    def __repr__(self) -> str:
        return f"EMA(decay={self.decay:g}, {len(self.parameters)} tensors{', with warm-up' * self.warmup})"

    def compute_decay(self, n: int) -> float:
        """Return the decay of update n = 0, 1, ...; it is 0 for the first, which copies (authors' code)."""
        if n == 0:
            return 0.0
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, net: nn.Module, n: int) -> None:
        """Update the average after step n = 0, 1, ...: average = decay average + (1 - decay) parameters."""
        current = [p.detach().float() for p in net.parameters()]
        torch._foreach_lerp_(list(self.parameters.values()), current, 1 - self.compute_decay(n))
        for name, buffer in net.named_buffers():
            if name in self.buffers:
                self.buffers[name].copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average itself, not a copy, for `net.load_state_dict`."""
        return self.parameters | self.buffers
