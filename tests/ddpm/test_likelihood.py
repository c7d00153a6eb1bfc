import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from ddpm.config import DiffusionConfig
from ddpm.denoisers import convert_mse_to_terms
from ddpm.diffusion import Diffusion
from ddpm.gaussians import compute_decoder_log_likelihood
from ddpm.images import from_uint8
from ddpm.likelihood import BoundTerms, compute_bits_per_dim, compute_prior, compute_rate_distortion

PAPER = DiffusionConfig()


def noise_like(x: torch.Tensor, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda t, rows: torch.randn(x.shape, generator=generator, dtype=x.dtype)[rows]


def blurred(x_t, t):
    return 0.3 * x_t + 0.1 * torch.sin(t.to(x_t.dtype) / 100).reshape(-1, 1, 1, 1)


def grey(level: int, n: int = 1) -> torch.Tensor:
    return torch.full((n, 3, 8, 8), level / 127.5 - 1, dtype=torch.float64)


@pytest.mark.parametrize("level, variance, golden", [
    (128, "fixedlarge", 1.7920843763663414), (128, "fixedsmall", 1.3056651463222535),
    (0, "fixedlarge", 0.9963562219745046), (255, "fixedsmall", 0.5099369919304167),
])  # fmt: skip
def test_bound_of_a_constant_image_under_the_true_noise(level, variance, golden):
    """Golden totals of the authors' evaluation in float64, without the noise that rounding adds."""
    x_0, diffusion = grey(level), Diffusion(replace(PAPER, variance=variance))

    def true_eps(x_t, t):
        mean, spread, _ = diffusion.q_mean_variance(x_0.expand_as(x_t), t)
        return (x_t - mean) / spread.sqrt()

    result = compute_bits_per_dim(diffusion, true_eps, x_0, noise_like(x_0), batch_size=100)
    assert result.total.item() == pytest.approx(golden, abs=1e-9)
    assert result.mse.max() < 1e-15


@pytest.mark.parametrize("pixel, mean, decoder, golden", [
    (128, 128, "tanh", -0.9050181142), (128, 130, "tanh", -2.9585112273), (0, 0, "tanh", -0.3534412087),
    (255, 250, "tanh", -15.4171923570), (1, 0, "tanh", -1.4186039242), (128, 128, "erf", -0.9048188415),
])  # fmt: skip
def test_decoder_golden_values(pixel, mean, decoder, golden):
    """Nats at log scale -4.908362567647835 (fixedsmall and fixedlarge at t = 0), authors' code in float64."""
    x, m = (torch.tensor(value / 127.5 - 1, dtype=torch.float64) for value in (pixel, mean))
    log_variance = torch.tensor(2 * -4.908362567647835, dtype=torch.float64)
    found = compute_decoder_log_likelihood(x, m, log_variance, decoder)
    assert found.item() == pytest.approx(golden, abs=1e-9)


@pytest.mark.parametrize("decoder", ["tanh", "erf"])
@pytest.mark.parametrize("mean", [-1.3, -0.7, 0.0, 0.123, 1.0])
@pytest.mark.parametrize("log_variance", [-8.0, -5.0, 0.0])
def test_the_decoder_sums_to_one_over_the_256_levels(decoder, mean, log_variance):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    m, lv = torch.full_like(levels, mean), torch.full_like(levels, log_variance)
    total = compute_decoder_log_likelihood(levels, m, lv, decoder).exp().sum().item()
    assert total == pytest.approx(1, abs=256e-12)


def test_prior_golden_value_of_second_moments():
    """L_T depends on the images through E[x^2] alone: the CIFAR-10 figures from their second moments."""
    diffusion = Diffusion(PAPER)
    for second_moment, golden in ((0.2559858, 7.452938e-06), (0.2546380, 7.413700e-06)):
        x_0 = torch.full((1, 1, 1, 1), math.sqrt(second_moment), dtype=torch.float64)
        assert compute_prior(diffusion, x_0).item() == pytest.approx(golden, abs=2e-12)


@pytest.mark.parametrize("predict", ["eps", "x0"])
@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_terms_and_mse_satisfy_their_identity(predict, variance):
    """For a fixed variance and t >= 1: term = (c_1^2 exp(-lv_2) / 2 mse + v) / ln 2."""
    diffusion = Diffusion(replace(PAPER, predict=predict, variance=variance))
    x_0 = from_uint8(torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)).double()
    result = compute_bits_per_dim(diffusion, blurred, x_0, noise_like(x_0), batch_size=50 * len(x_0))
    expected = torch.stack([convert_mse_to_terms(diffusion, mse) for mse in result.mse])
    torch.testing.assert_close(result.terms[:, 1:], expected[:, 1:], rtol=1e-9, atol=1e-12)
    overhead = {"fixedlarge": 0.48641923, "fixedsmall": 0.0}[variance]
    nothing = convert_mse_to_terms(diffusion, torch.zeros(1000))
    assert nothing[1:].sum().item() == pytest.approx(overhead, abs=5e-9) and nothing[0] == 0


def test_float32_agrees_with_float64():
    x_0 = from_uint8(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    diffusion = Diffusion(replace(PAPER, predict="x0"))
    draws = torch.randn(1000, *x_0.shape, generator=torch.Generator().manual_seed(0))

    def near(x_t, t):
        clean = x_0.to(x_t.dtype).repeat(len(x_t) // len(x_0), 1, 1, 1)
        return clean + 1e-5 * (t.reshape(-1, 1, 1, 1) + 100) * torch.cos(9 * clean)

    bound = partial(compute_bits_per_dim, diffusion, near, batch_size=200)
    single = bound(x_0, lambda t, rows: draws[t][rows])
    double = bound(x_0.double(), lambda t, rows: draws[t][rows].double())
    assert single.terms.dtype == torch.float64
    torch.testing.assert_close(single.total, double.total, rtol=1e-5, atol=0)


def test_an_image_has_one_result_whatever_the_batching():
    x_0 = from_uint8(torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)).double()
    draws = [noise_like(x_0, t)(t, slice(None)) for t in range(10)]
    diffusion = Diffusion(DiffusionConfig(timesteps=10, predict="x0"))
    assert_close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)

    def bound(row=slice(None), **how):
        return compute_bits_per_dim(diffusion, blurred, x_0[row], lambda t, rows: draws[t][row][rows], **how)

    whole, parts = bound(), bound(batch_size=9)
    late, early = (bound(timesteps=range(*ends), batch_size=6) for ends in ((6, 10), (0, 6)))
    for name in ("terms", "mse"):
        assert_close(getattr(parts, name), getattr(whole, name))
        assert_close(torch.cat([getattr(early, name), getattr(late, name)], dim=1), getattr(whole, name))
    with pytest.raises(ValueError, match="only some"):
        _ = late.total
    for row in (slice(0, 1), slice(1, 3)):
        assert_close(bound(row).total, whole.total[row])


def test_context_follows_its_images():
    x_0, labels = grey(100, n=2), torch.tensor([0.1, 0.7], dtype=torch.float64)
    result = compute_bits_per_dim(
        Diffusion(DiffusionConfig(timesteps=4, predict="x0")),
        lambda x_t, t, context: context.reshape(-1, 1, 1, 1).expand_as(x_t),
        x_0, noise_like(x_0), context=labels, batch_size=6,
    )  # fmt: skip
    expected = (labels - x_0[0, 0, 0, 0]) ** 2
    torch.testing.assert_close(result.mse, expected[:, None].expand(2, 4))


def test_rate_distortion_rows_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    terms, mse = (torch.rand(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    prior = torch.rand(3, generator=generator, dtype=torch.float64)
    table = compute_rate_distortion(BoundTerms(torch.arange(6), terms, mse, prior))
    for k in range(1, 7):
        rate = sum(prior[n] + sum(terms[n, i] for i in range(6 - k + 1, 6)) for n in range(3)) / 3
        assert table.rate[k - 1].item() == pytest.approx(float(rate))
        rmse = 127.5 * math.sqrt(sum(mse[n, 6 - k] for n in range(3)) / 3)
        assert table.rmse[k - 1].item() == pytest.approx(rmse)
    assert table.distortion == pytest.approx(float(terms[:, 0].mean()))


def test_clip_and_variance_are_honoured_and_a_shortened_chain_is_refused():
    x_0 = grey(200)
    diffusion = Diffusion(DiffusionConfig(timesteps=5, predict="x0"))

    def bound(process, **how):
        return compute_bits_per_dim(process, lambda x_t, t: 3 + 0 * x_t, x_0, noise_like(x_0), **how)

    level = x_0[0, 0, 0, 0].item()
    clipped, free = bound(diffusion), bound(diffusion, clip=False, variance="fixedsmall")
    assert clipped.mse[0, 0].item() == pytest.approx((1 - level) ** 2)
    assert free.mse[0, 0].item() == pytest.approx((3 - level) ** 2)
    assert free.terms[0, 2] > clipped.terms[0, 2]
    with pytest.raises(ValueError, match="full chain"):
        bound(diffusion.respace([0, 2, 4]))


@pytest.mark.parametrize("scale", [127.5, math.nan])
def test_images_that_are_not_scaled_have_no_bound(scale):
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        compute_bits_per_dim(Diffusion(DiffusionConfig(timesteps=5)), lambda x_t, t: x_t, scale * grey(200))
