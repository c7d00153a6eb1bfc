"""Faults of the science that were once there, held by Nichol and Dhariwal 2021 and by arithmetic."""

import pytest
import torch

from ddpm.config import DiffusionConfig
from ddpm.diffusion import Diffusion

LINEAR_4000 = {"timesteps": 4000, "beta_start": 2.5e-5, "beta_end": 0.005}


@pytest.mark.parametrize(
    "settings, lowest, highest",
    [
        ({}, -9.816725, -9.210340),
        ({"timesteps": 4000, "beta_schedule": "cosine"}, -12.204540, -11.526430),
        (LINEAR_4000, -11.265783, -10.596635),
    ],
)
def test_the_learned_variance_of_the_last_step_ranges_to_log_beta_1(settings, lowest, highest):
    """Improved DDPM, Eq. 15, as its code has it."""
    diffusion = Diffusion(DiffusionConfig(variance="learned_range", loss="vlb", **settings))
    values = torch.tensor([-1.0, 1.0, 0.5]).reshape(3, 1, 1, 1).requires_grad_()
    x, t = torch.full((3, 1, 1, 1), 0.2), torch.zeros(3, dtype=torch.int64)
    output = torch.cat([torch.zeros_like(x), values], dim=1)
    found = diffusion.p_mean_variance(output, x, t).log_variance.flatten().tolist()
    assert found[:2] == pytest.approx([lowest, highest], abs=2e-5)
    (gradient,) = torch.autograd.grad(diffusion.compute_losses(output, x, x, t, x).sum(), values)
    assert (gradient != 0).all(), "the bound of the last step trains its variance"


@pytest.mark.parametrize("steps", [[5], [0, 9, 19], list(range(19))])
def test_the_learned_variance_ranges_to_log_beta_in_every_chain(steps):
    chain = Diffusion(DiffusionConfig(timesteps=20, variance="learned_range", loss="hybrid")).respace(steps)
    x, t = torch.zeros(len(steps), 1, 1, 1, dtype=torch.float64), torch.arange(len(steps))
    highest = chain.p_mean_variance(torch.cat([x, torch.ones_like(x)], 1), x, t).log_variance
    torch.testing.assert_close(highest.flatten(), chain.tables["beta"].log())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"timesteps": 100}, ("keeps 36%", "beta_start=0.001 beta_end=0.2", "T=100")),
        ({"timesteps": 500}, ("keeps 0.64%", "beta_start=0.0002 beta_end=0.04")),
        ({"timesteps": 100, "beta_schedule": "const"}, ("keeps 13%", "beta_end=0.2")),
        ({"timesteps": 500, "beta_schedule": "quad"}, ("keeps 2.7%",)),
        ({"beta_end": 0.01}, ("keeps 0.63%", "beta_end=0.02")),
        ({"timesteps": 10}, ("keeps 90%", "raise diffusion.timesteps")),
        ({"timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}, ()),
        *(({"beta_schedule": schedule}, ()) for schedule in ("linear", "quad", "const", "warmup10", "warmup50")),
        ({"timesteps": 2, "beta_schedule": "cosine"}, ()),
        ({"timesteps": 2, "beta_schedule": "jsd", "predict": "mean", "loss": "vlb"}, ()),
        (LINEAR_4000, ()),
    ],
)  # fmt: skip
def test_a_signal_that_is_left_in_the_last_step_is_a_warning(settings, words):
    found = DiffusionConfig(**settings).list_warnings()
    assert len(found) == bool(words) and all(word in found[0] for word in words)
