"""The beta schedules, float64."""

import math
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from ddpm.config import BetaSchedule, DiffusionConfig

space_evenly = partial(torch.linspace, dtype=torch.float64)  # from start to end, in so many values


def get_betas(config: DiffusionConfig) -> Tensor:
    """Return the betas of the settings, float64 (T,): their own, or those of the schedule they name."""
    if config.betas:
        return torch.tensor(config.betas, dtype=torch.float64)
    return compute_betas(config.beta_schedule, config.timesteps, config.beta_start, config.beta_end)


def compute_betas(name: str, timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Return beta_1..beta_T at index 0..T-1, float64 (T,). End points are not rescaled with T (authors' code).

    jsd and cosine ignore the end points; const uses beta_end alone. jsd ends at beta = 1, so alpha_bar_T = 0.
    """
    match name:
        case "linear":
            return space_evenly(beta_start, beta_end, timesteps)
        case "quad":
            return space_evenly(beta_start**0.5, beta_end**0.5, timesteps) ** 2
        case "const":
            return space_evenly(beta_end, beta_end, timesteps)
        case "warmup10" | "warmup50":
            warm = timesteps // (10 if name == "warmup10" else 2)
            rest = space_evenly(beta_end, beta_end, timesteps - warm)
            return torch.cat([space_evenly(beta_start, beta_end, warm), rest])
        case "jsd":
            return 1 / space_evenly(timesteps, 1, timesteps)
        case "cosine":  # Nichol and Dhariwal 2021, Eq. 17, with beta capped at 0.999
            u = space_evenly(0, 1, timesteps + 1)
            alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown beta schedule {name!r}: choose one of {', '.join(get_args(BetaSchedule))}")
