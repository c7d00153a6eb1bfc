"""The schedules, and the timesteps that are drawn by importance."""

import math
from typing import get_args

import pytest
import torch

from ddpm import rng, schedules
from ddpm.config import BetaSchedule
from ddpm.rng import Stream
from ddpm.timesteps import HISTORY, ImportanceSampler


@pytest.mark.parametrize("name, middle, last", [
    # alpha_bar[499] and alpha_bar[999] by the authors' code, to the digits printed
    ("linear", "0.078587", "4.0358e-05"), ("quad", "0.333188", "7.334e-04"),
    ("const", "4.10e-05", "1.683e-09"), ("warmup10", "1.125e-04", "4.61e-09"),
    ("warmup50", "6.353e-03", "2.61e-07"), ("jsd", "0.500000", "0.0e+00"),
])  # fmt: skip
def test_alpha_bar_of_the_authors_schedules(name, middle, last):
    alpha_bar = torch.cumprod(1 - schedules.compute_betas(name, 1000, 1e-4, 0.02), 0)
    for value, printed in ((alpha_bar[499], middle), (alpha_bar[999], last)):
        digits = len(printed.split("e")[0].split(".")[1])
        assert f"{float(value):.{digits}{'e' if 'e' in printed else 'f'}}" == printed


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


def filled(scale: torch.Tensor) -> ImportanceSampler:
    sampler = ImportanceSampler(len(scale))
    for _ in range(HISTORY):
        sampler.update(torch.arange(len(scale)), scale)
    return sampler


def test_probabilities_follow_the_losses_once_every_timestep_has_a_full_history():
    sampler = ImportanceSampler(4)
    for _ in range(HISTORY):
        assert sampler.compute_probabilities().tolist() == [0.25] * 4
        sampler.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    expected = 0.999 * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) + 0.001 / 4
    torch.testing.assert_close(sampler.compute_probabilities(), expected)


def test_the_oldest_losses_go_first_also_within_one_batch():
    sampler, values = filled(torch.ones(2)), torch.arange(1.0, 1 + HISTORY + 3)
    sampler.update(torch.zeros(len(values), dtype=torch.int64), values)
    assert sorted(sampler.losses[0].tolist()) == values[-HISTORY:].tolist()
    sampler.update(torch.tensor([0, 1, 0]), torch.tensor([100.0, 7.0, 101.0]))
    assert sorted(sampler.losses[0].tolist()) == [*values[-HISTORY + 2 :].tolist(), 100.0, 101.0]
    assert sorted(sampler.losses[1].tolist()) == [1.0] * 9 + [7.0]
    assert sampler.counts.tolist() == [HISTORY * 2 + 5, HISTORY + 1]


def test_draws_follow_p_and_the_weights_keep_the_mean():
    losses = torch.tensor([0.0, 1.0, 2.0, 5.0])
    sampler = filled(losses)
    t, weights = sampler.draw(rng.draw_uniform(1, Stream.TIMESTEP, 0, torch.arange(200_000)))
    frequency = torch.bincount(t, minlength=4) / len(t)
    torch.testing.assert_close(frequency.double(), sampler.compute_probabilities(), rtol=0, atol=5e-3)
    assert abs((losses[t] * weights).mean() - losses.mean()) < 0.01
    edge, _ = sampler.draw(torch.tensor([0.0, 1 - 2.0**-24]))
    assert edge.tolist() == [0, 3]
