"""The beta schedules, float64."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def betas(name: str, timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Return beta_1..beta_T at index 0..T-1, float64 (T,). End points are not rescaled with T (authors' code).

    jsd and cosine ignore the end points; const uses beta_end alone. jsd ends at beta = 1, so alpha_bar_T = 0.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown beta schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](timesteps, beta_start, beta_end)


def _line(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _warmup(timesteps: int, start: float, end: float, fraction: float) -> Tensor:
    warm = int(timesteps * fraction)
    return torch.cat([_line(start, end, warm), _line(end, end, timesteps - warm)])


def _cosine(timesteps: int) -> Tensor:
    """Return the schedule of Nichol and Dhariwal 2021, Eq. 17, with beta capped at 0.999."""
    u = _line(0, 1, timesteps + 1)
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": lambda steps, start, end: _line(start, end, steps),
    "quad": lambda steps, start, end: _line(start**0.5, end**0.5, steps) ** 2,
    "const": lambda steps, start, end: _line(end, end, steps),
    "warmup10": lambda steps, start, end: _warmup(steps, start, end, 0.1),
    "warmup50": lambda steps, start, end: _warmup(steps, start, end, 0.5),
    "jsd": lambda steps, start, end: 1 / _line(steps, 1, steps),
    "cosine": lambda steps, start, end: _cosine(steps),
}
