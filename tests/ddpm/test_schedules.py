import math
from typing import get_args

import pytest
import torch

from ddpm import schedules
from ddpm.config import BetaSchedule


@pytest.mark.parametrize(
    "name, middle, last",
    [  # alpha_bar[499] and alpha_bar[999] by the authors' code, to the digits printed
        ("linear", "0.078587", "4.0358e-05"), ("quad", "0.333188", "7.334e-04"),
        ("const", "4.10e-05", "1.683e-09"), ("warmup10", "1.125e-04", "4.61e-09"),
        ("warmup50", "6.353e-03", "2.61e-07"), ("jsd", "0.500000", "0.0e+00"),
    ],
)  # fmt: skip
def test_alpha_bar_of_the_authors_schedules(name, middle, last):
    alpha_bar = torch.cumprod(1 - schedules.compute_betas(name, 1000, 1e-4, 0.02), 0)
    for value, printed in ((alpha_bar[499], middle), (alpha_bar[999], last)):
        digits = len(printed.split("e")[0].split(".")[1])
        text = f"{float(value):.{digits}e}" if "e" in printed else f"{float(value):.{digits}f}"
        assert text == printed


def test_cosine_is_squared_cosine_with_a_cap():
    beta = schedules.compute_betas("cosine", 1000)
    u = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    wave = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)[(u * 1000).long() - 1]
    torch.testing.assert_close(alpha_bar, wave, rtol=1e-6, atol=0)
    assert beta[-1] == 0.999


@pytest.mark.parametrize("name", get_args(BetaSchedule))
@pytest.mark.parametrize("timesteps", [2, 7, 1000, 4000])
def test_every_schedule_is_float64_of_length_T_within_0_and_1(name, timesteps):
    beta = schedules.compute_betas(name, timesteps)
    assert beta.dtype == torch.float64 and beta.shape == (timesteps,)
    assert beta.min() > 0 and beta.max() <= 1
    assert (beta.diff() >= 0).all()
