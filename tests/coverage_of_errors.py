"""How often the intervals of an estimated NLL hold what they promise, by a denoiser that is known in closed form."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm.config import DiffusionConfig
from ddpm.denoisers import compute_linear_mse, compute_profile, convert_mse_to_terms
from ddpm.diffusion import Diffusion
from ddpm.likelihood import draw_timesteps
from pipeline.stages.evaluate import bound
from pipeline.store.arrays import write_unit_arrays

DRAWS, SEEDS = 7, 100


def measure_coverage(x: torch.Tensor, folder) -> tuple[int, float, float]:
    """Of 100 seeds, how many intervals of the line's rate hold its expectation over images x (N, D).

    Also the estimates' spread and their mean error. Each term's noise is normal with its exact variance.
    """
    diffusion, generator = Diffusion(DiffusionConfig()), torch.Generator().manual_seed(0)
    mean, n = x.mean(dim=0), len(x)
    variances, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / n)
    variances, squares = variances.clamp(min=0), ((x - mean) @ vectors) ** 2
    a = diffusion.tables["alpha_bar"][:, None]
    s = a * variances / (a * variances + 1 - a)
    own, noise = (1 - s) ** 2, s**2 * (1 - a) / a
    # Of each image and t, (N, T): the expectation over the noise, and the standard deviation.
    mse = (squares @ own.T + noise.sum(dim=1)) / x.shape[1]
    spread = (4 * squares @ (own * noise).T + 2 * (noise**2).sum(dim=1)).sqrt() / x.shape[1]
    overhead = convert_mse_to_terms(diffusion, torch.zeros(1000))
    per_error = convert_mse_to_terms(diffusion, torch.ones(1000)) - overhead
    terms = overhead + per_error * mse
    truth = convert_mse_to_terms(diffusion, compute_linear_mse(variances, a[:, 0])).sum().item()
    assert terms[:, 1:].sum(dim=1).mean().item() == pytest.approx(truth, rel=1e-9)
    q, held, found = compute_profile(diffusion, variances), 0, []
    for seed in range(SEEDS):
        t, weights = draw_timesteps(q, seed, torch.arange(n), DRAWS)
        drawn = terms.gather(1, t)
        drawn += (per_error * spread).gather(1, t) * torch.randn(t.shape, generator=generator).double()
        drawn[:, 0] = 0  # the rate alone
        file = folder / f"{seed}.npz"
        arrays = {"terms": drawn.numpy(), "weights": weights.numpy(), "mse": drawn.numpy()}
        write_unit_arrays(file, **arrays, prior=np.zeros(n))
        scores, nll = bound.average_bound({file: SimpleNamespace(images=n)}, 1000, DRAWS)
        held += abs(scores["rate_bpd"] - truth) < 1.96 * nll["set_se"]
        found.append((scores["rate_bpd"], nll["set_se"]))
        assert scores["rate_bpd_se"] > 1.2 * nll["set_se"], "between images is another error than within"
    estimates, errors = np.array(found).T
    return held, estimates.std(ddof=1), errors.mean()
