import torch

from ddpm import rng
from ddpm.rng import Stream
from ddpm.timesteps import HISTORY, ImportanceSampler


def filled(scale: torch.Tensor) -> ImportanceSampler:
    sampler = ImportanceSampler(len(scale))
    for _ in range(HISTORY):
        sampler.update(torch.arange(len(scale)), scale)
    return sampler


def test_probabilities_follow_the_losses_once_every_timestep_has_a_full_history():
    sampler = ImportanceSampler(4)
    for _ in range(HISTORY):
        uniform = torch.full((4,), 0.25, dtype=torch.float64)
        torch.testing.assert_close(sampler.compute_probabilities(), uniform)
        sampler.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert sampler.compute_probabilities()[3] > 0.39
    p = filled(torch.tensor([1.0, 2.0, 3.0, 4.0])).compute_probabilities()
    expected = 0.999 * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) + 0.001 / 4
    torch.testing.assert_close(p, expected)


def test_the_oldest_losses_go_first_also_within_one_batch():
    sampler = filled(torch.ones(2))
    values = torch.arange(1.0, 1 + HISTORY + 3)
    sampler.update(torch.zeros(len(values), dtype=torch.int64), values)
    assert sorted(sampler.losses[0].tolist()) == values[-HISTORY:].tolist()
    sampler.update(torch.tensor([0, 1, 0]), torch.tensor([100.0, 7.0, 101.0]))
    assert sorted(sampler.losses[0].tolist()) == [*values[-HISTORY + 2 :].tolist(), 100.0, 101.0]
    assert sorted(sampler.losses[1].tolist()) == [1.0] * 9 + [7.0]
    assert sampler.counts.tolist() == [HISTORY * 2 + 5, HISTORY + 1]


def test_draws_follow_p_and_the_weights_keep_the_mean():
    sampler = filled(torch.tensor([0.0, 1.0, 2.0, 5.0]))
    u = rng.draw_uniform(1, Stream.TIMESTEP, 0, torch.arange(200_000))
    t, weights = sampler.draw(u)
    frequency = torch.bincount(t, minlength=4) / len(t)
    torch.testing.assert_close(frequency.double(), sampler.compute_probabilities(), rtol=0, atol=5e-3)
    losses = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert abs((losses[t] * weights).mean() - losses.mean()) < 0.01
    edge, _ = sampler.draw(torch.tensor([0.0, 1 - 2.0**-24]))
    assert edge.tolist() == [0, 3]
