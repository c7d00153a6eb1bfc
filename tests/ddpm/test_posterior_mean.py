import math

import pytest
import torch

from ddpm.config import DiffusionConfig
from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.posterior_mean import PosteriorMean, compute_posterior_mean

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


def test_no_image_is_too_far_for_float32():
    x_t = torch.tensor([-50.0, 0, 50])[:, None, None, None].expand(3, 1, 2, 3)
    found = compute_posterior_mean(x_t, torch.full((3,), 0.9999, dtype=torch.float64), IMAGES, chunk=3)
    assert found.isfinite().all() and found.abs().max() <= 1 + 1e-6
