"""Importance sampling of t for the variational bound (Nichol and Dhariwal 2021, Sec. 3.3)."""

import torch
from torch import Tensor

HISTORY = 10  # losses kept per timestep
UNIFORM = 0.001  # share of t that is drawn uniformly, so that none is never drawn (authors' code)


class ImportanceSampler:
    """Draws t with p(t) proportional to sqrt(E[L_t^2]) of the last losses at t; uniform until each t has enough.

    losses float32 (T, 10) and counts int64 (T,), the number of losses seen, are the whole state: save it with
    the training state. Losses must be gathered over workers first, so that all hold the same.
    """

    def __init__(self, timesteps: int, device: torch.device | str = "cpu"):
        self.losses = torch.zeros(timesteps, HISTORY, device=device)
        self.counts = torch.zeros(timesteps, dtype=torch.int64, device=device)

    def compute_probabilities(self) -> Tensor:
        """Return p(t), float64 (T,)."""
        scores = (self.losses.double() ** 2).mean(dim=1).sqrt()
        share = (1 - UNIFORM) * scores / scores.sum() + UNIFORM / len(scores)
        ready = (self.counts >= HISTORY).all() & (scores.sum() > 0)
        return torch.where(ready, share, torch.full_like(share, 1 / len(share)))

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Draw t int64 (N,) by uniform u in [0, 1) (N,), and weights float32 (N,) that keep the loss unbiased."""
        p = self.compute_probabilities()
        t = torch.searchsorted(p.cumsum(0), u.double(), right=True).clamp(max=len(p) - 1)
        return t, (1 / (len(p) * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Store the unweighted losses (N,) at t (N,) of one global batch, in place of the oldest."""
        order = torch.argsort(t, stable=True)
        t, losses = t[order], losses[order].float()
        repeats = torch.bincount(t, minlength=len(self.counts))
        rank = torch.arange(len(t), device=t.device) - (repeats.cumsum(0) - repeats)[t]
        kept = rank >= repeats[t] - HISTORY  # of more than a full row in one batch, the last
        t, losses, rank = t[kept], losses[kept], rank[kept]
        self.losses[t, (self.counts[t] + rank) % HISTORY] = losses
        self.counts += repeats
