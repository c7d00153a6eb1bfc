"""The paper's formulas once more: plain loops over Python floats, written from the text, sharing no code."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from ddpm.config import DiffusionConfig
from ddpm.diffusion import Diffusion
from ddpm.sampler import run_chain

SMALL = DiffusionConfig(timesteps=20, beta_start=0.01, beta_end=0.3)
LINEAR = [0.01 + 0.29 * i / 19 for i in range(20)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Process:
    """Indexed by the paper's t = 1..T; alpha_bar_0 = 1. The betas are linear where none are given."""

    def __init__(self, betas: Sequence[float] = LINEAR):
        self.T = len(betas)
        self.beta = [math.nan, *betas]
        self.alpha_bar = [1.0]
        for beta in betas:
            self.alpha_bar.append(self.alpha_bar[-1] * (1 - beta))

    def q_sample(self, x_0: float, t: int, eps: float) -> float:
        return math.sqrt(self.alpha_bar[t]) * x_0 + math.sqrt(1 - self.alpha_bar[t]) * eps

    def posterior(self, x_0: float, x_t: float, t: int) -> tuple[float, float]:
        """By Bayes' rule: q(x_{t-1} | x_0) times q(x_t | x_{t-1}), as a Gaussian in x_{t-1}."""
        alpha, before = 1 - self.beta[t], self.alpha_bar[t - 1]
        if t == 1:
            return x_0, 0.0
        precision = 1 / (1 - before) + alpha / self.beta[t]
        weighted = math.sqrt(before) * x_0 / (1 - before) + math.sqrt(alpha) * x_t / self.beta[t]
        return weighted / precision, 1 / precision

    def variance(self, t: int, kind: str) -> float:
        if t == 1:
            t, kind = 2, "fixedsmall"  # the authors' stand-in
        return self.beta[t] if kind == "fixedlarge" else self.posterior(0.0, 0.0, t)[1]

    def x_0_from_eps(self, x_t: float, eps: float, t: int) -> float:
        return (x_t - math.sqrt(1 - self.alpha_bar[t]) * eps) / math.sqrt(self.alpha_bar[t])

    def mean_from_eps(self, x_t: float, eps: float, t: int) -> float:
        """Algorithm 2, line 4."""
        shift = self.beta[t] / math.sqrt(1 - self.alpha_bar[t]) * eps
        return (x_t - shift) / math.sqrt(1 - self.beta[t])

    def vlb_term(self, x_0: float, x_t: float, mean: float, variance: float, t: int) -> float:
        """L_{t-1} (Eq. 5) or, at t = 1, L_0 (Eq. 13) with the exact normal distribution function; nats."""
        if t == 1:
            return -math.log(pixel_probability(x_0, mean, math.sqrt(variance)))
        true_mean = self.posterior(x_0, x_t, t)[0]
        true_variance = self.variance(t, "fixedsmall")
        squared = (true_mean - mean) ** 2
        return 0.5 * (math.log(variance / true_variance) + (true_variance + squared) / variance - 1)


def pixel_probability(x: float, mean: float, sigma: float) -> float:
    below = 0.0 if x <= -1 else cdf((x - 1 / 255 - mean) / sigma)
    above = 1.0 if x >= 1 else cdf((x + 1 / 255 - mean) / sigma)
    return max(above - below, 1e-12)


def cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_everything_agrees_with_the_oracle(variance):
    """All functions at all t, against loops over Python floats written from the paper by another route."""
    config = replace(SMALL, variance=variance, loss="vlb")
    diffusion, process = Diffusion(config), Process()
    t = torch.arange(20)
    x_0 = (torch.arange(240, dtype=torch.float64).reshape(20, 3, 2, 2) * 7 % 256) / 127.5 - 1
    eps = randn(*x_0.shape)
    x_t = diffusion.q_sample(x_0, t, eps)
    output = eps + 0.1 * randn(*eps.shape, seed=1)
    mean, spread, _ = diffusion.q_mean_variance(x_0, t)
    posterior = diffusion.q_posterior(x_0, x_t, t)
    p = diffusion.p_mean_variance(output, x_t, t, clip=False)
    clipped = diffusion.p_mean_variance(output, x_t, t, clip=True)
    term = diffusion.compute_bound_terms(p, x_0, x_t, t, decoder="erf")
    for i in range(20):
        expected_term = 0.0
        for pixel in range(12):

            def at(tensor, i=i, pixel=pixel):
                return tensor.expand(20, 3, 2, 2)[i].flatten()[pixel].item()

            code, paper = at(output), i + 1
            x = at(x_t)
            assert x == pytest.approx(process.q_sample(at(x_0), paper, at(eps)), abs=1e-12)
            assert at(mean) == pytest.approx(math.sqrt(process.alpha_bar[paper]) * at(x_0), abs=1e-12)
            assert at(spread) == pytest.approx(1 - process.alpha_bar[paper], rel=1e-12)
            m, v = process.posterior(at(x_0), x, paper)
            posterior_variance = diffusion.tables["posterior_variance"][i].item()
            assert (at(posterior.mean), posterior_variance) == pytest.approx((m, v), abs=1e-11)
            estimate = process.x_0_from_eps(x, code, paper)
            assert at(p.x_0) == pytest.approx(estimate, abs=1e-11)
            assert at(p.mean) == pytest.approx(process.mean_from_eps(x, code, paper), abs=1e-11)
            sigma2 = process.variance(paper, variance)
            assert at(p.log_variance) == pytest.approx(math.log(sigma2), abs=1e-11)
            limited = max(-1.0, min(1.0, estimate))
            assert at(clipped.mean) == pytest.approx(process.posterior(limited, x, paper)[0], abs=1e-11)
            expected_term += process.vlb_term(at(x_0), x, at(p.mean), sigma2, paper) / 12 / math.log(2)
        assert term[i].item() == pytest.approx(expected_term, rel=1e-9, abs=1e-12)


def test_respaced_chain_agrees_with_the_oracle():
    process = Process()
    kept = [1, 4, 5, 13, 19]
    bars = [1.0] + [process.alpha_bar[i + 1] for i in kept]
    short = Process([1 - bars[i + 1] / bars[i] for i in range(5)])
    chain = Diffusion(replace(SMALL, variance="fixedsmall")).respace(kept)
    assert len(chain) == 5 and chain.timesteps.tolist() == kept
    x_t, eps = randn(5, 1, 1, 1), randn(5, 1, 1, 1, seed=1)
    p = chain.p_mean_variance(eps, x_t, torch.arange(5), clip=False)
    for i in range(5):
        assert p.mean[i].item() == pytest.approx(short.mean_from_eps(x_t[i].item(), eps[i].item(), i + 1))
        assert p.log_variance[i].item() == pytest.approx(math.log(short.variance(i + 1, "fixedsmall")))


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_algorithm_2_agrees_with_the_oracle(variance):
    process, z = Process(), randn(21, seed=3).tolist()
    x = start = z[20]
    for t in range(20, 0, -1):
        mean = process.mean_from_eps(x, math.tanh(x), t)
        x = mean + (math.sqrt(process.variance(t, variance)) * z[t - 1] if t > 1 else 0.0)
    x_T = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
    chain = run_chain(
        Diffusion(replace(SMALL, variance=variance)), lambda x_t, t: torch.tanh(x_t), x_T,
        lambda t: torch.full_like(x_T, z[t]), clip=False,
    )  # fmt: skip
    assert list(chain)[-1].x_t.item() == pytest.approx(x, abs=1e-10)
