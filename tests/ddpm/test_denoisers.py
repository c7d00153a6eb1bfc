"""Denoisers that are known in closed form, and the estimate of the bound by few timesteps of each image."""

import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from ddpm.config import DiffusionConfig
from ddpm.denoisers import PosteriorMean, compute_posterior_mean, compute_profile
from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.likelihood import compute_bits_per_dim, draw_timesteps
from ddpm.rng import Stream, draw_normal

IMAGES = torch.randint(0, 256, (7, 1, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES[1] = IMAGES[0]
IMAGES[1, 0, 0, 0] ^= 1  # two images that differ by one level of one value


@pytest.mark.parametrize("predict", ["eps", "x0", "mean", "v"])
def test_the_network_is_the_posterior_mean_by_bayes_rule(predict):
    """Against a loop over images and the density of q(x_t | x_0), at noise from the least to the most."""
    diffusion = Diffusion(DiffusionConfig(predict=predict))
    x_n = from_uint8(IMAGES).double()
    t = torch.tensor([0, 0, 3, 100, 400, 700, 999])
    noise = torch.randn(x_n.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_t = diffusion.q_sample(x_n, t, noise)
    found = diffusion.predict_x0(PosteriorMean(diffusion, IMAGES)(x_t, t), x_t, t)
    in_parts = compute_posterior_mean(x_t, diffusion.tables["alpha_bar"][t], IMAGES, chunk=2)
    for i, a in enumerate(diffusion.tables["alpha_bar"][t].tolist()):
        logs = [-float((x_t[i] - math.sqrt(a) * x).square().sum()) / 2 / (1 - a) for x in x_n]
        weights = [math.exp(log - max(logs)) for log in logs]
        expected = sum(w * x for w, x in zip(weights, x_n, strict=True)) / sum(weights)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(in_parts[i], expected, rtol=0, atol=1e-9)
    # No image is too far for float32.
    x_t = torch.tensor([-50.0, 0, 50])[:, None, None, None].expand(3, 1, 2, 3)
    found = compute_posterior_mean(x_t, torch.full((3,), 0.9999, dtype=torch.float64), IMAGES, chunk=3)
    assert found.isfinite().all() and found.abs().max() <= 1 + 1e-6


CONFIG = DiffusionConfig(timesteps=40, beta_start=0.002, beta_end=0.4, predict="x0")
INDEX = torch.arange(16)


def denoise(x_t, t, context=None):
    return 0.4 * x_t + 0.1 * torch.sin(t.to(x_t.dtype)).reshape(-1, 1, 1, 1)


def noise(t, rows):
    return draw_normal(7, Stream.NLL, t, INDEX[rows], (1, 4, 4)).double()


def test_a_profile_belongs_to_its_schedule_and_variance_and_stands_a_singular_covariance():
    variances = torch.tensor([0.5, 0.1, 0.0, 0.0], dtype=torch.float64)
    changes = ({}, {"beta_schedule": "cosine"}, {"timesteps": 20}, {"variance": "fixedsmall"})
    configs = [replace(CONFIG, **change) for change in changes]
    profiles = [compute_profile(Diffusion(config), variances) for config in configs]
    for q in (*profiles, compute_profile(Diffusion(configs[-1]), 0 * variances)):
        assert q[0] == 0 and (q[1:] > 0).all() and q.sum() == pytest.approx(1)
    assert len({tuple(q.tolist()) for q in profiles}) == 4
    learned = compute_profile(Diffusion(replace(CONFIG, variance="learned_range", loss="hybrid")), variances)
    assert torch.equal(learned, profiles[0])


def test_every_drawn_term_is_the_full_tables_entry_and_the_weights_add_up_to_the_table():
    diffusion, net = Diffusion(CONFIG), Mock(wraps=denoise)
    x_0 = draw_normal(0, Stream.FIGURES, 0, INDEX, (1, 4, 4)).clamp(-1, 1).double()
    q = compute_profile(diffusion, torch.full((16,), 0.3).double())
    full = compute_bits_per_dim(diffusion, denoise, x_0, noise)
    t, weights = draw_timesteps(q, 7, INDEX, 12)
    drawn = compute_bits_per_dim(diffusion, net, x_0, noise, timesteps=t, batch_size=10)
    calls = [len(call.args[0]) for call in net.call_args_list]
    torch.testing.assert_close(drawn.terms, full.terms.gather(1, t))
    torch.testing.assert_close(drawn.mse, full.mse.gather(1, t))
    torch.testing.assert_close(drawn.prior, full.prior)
    assert (t[:, 0] == 0).all() and (t[:, 1:] > 0).all() and (weights[:, 0] == 1).all()
    assert sum(calls) == sum(len(row.unique()) for row in t) < t.numel(), "equal pairs are computed once"
    assert max(calls) <= 10
    # In expectation over t: q(t) times the weight of t is 1 / draws.
    torch.testing.assert_close(12 * (q[t] * weights)[:, 1:], torch.ones(16, 12).double())
    later = draw_timesteps(q, 7, INDEX[9:], 3)[0]
    assert torch.equal(later, t[9:, :4]), "a draw depends on its image and number alone"
