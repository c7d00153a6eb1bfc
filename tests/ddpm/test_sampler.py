from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from test_oracle import SMALL, randn

from ddpm import sampler
from ddpm.config import DiffusionConfig, Spacing
from ddpm.diffusion import Diffusion
from ddpm.gaussians import draw_gaussian
from ddpm.rng import Stream, draw_normal
from ddpm.sampler import run_chain
from ddpm.training import compute_batch_loss

SHAPE = (2, 3, 4, 4)


def noise(t: int) -> torch.Tensor:
    return randn(*SHAPE, seed=1000 + t)


def net(x_t, t, context=None):
    shift = 0 if context is None else context.to(x_t.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(x_t + 0.1 * shift) * (1 + t.reshape(-1, 1, 1, 1) / 100).to(x_t.dtype)


def test_normal_data_with_fixedlarge_is_reversed_exactly():
    """Data N(0, I): the optimal eps is sqrt(1 - abar_t) x_t, and every x_t stays N(0, I) (Sec. 3.2).

    The chain is linear: with each source of noise on a pixel of its own, the sum of squares is the variance.
    The last step adds no noise, so x_0 lacks beta_1 of it.
    """
    diffusion = Diffusion(replace(SMALL, variance="fixedlarge"))
    optimal = diffusion.tables["one_minus_alpha_bar"].sqrt().reshape(-1, 1, 1, 1)
    sources = torch.eye(20, dtype=torch.float64).reshape(20, 1, 1, 1, 20)  # x_T and z_19..z_1
    shown = partial(run_chain, diffusion, lambda x_t, t: optimal[t] * x_t, sources[0], clip=False)
    for step in shown(lambda t: sources[20 - t]):
        variance = (step.x_t**2).sum().item()
        expected = 1 - diffusion.tables["beta"][0].item() if step.t == 0 else 1.0
        assert variance == pytest.approx(expected, abs=1e-12)


def test_a_step_back_is_one_of_the_chain_for_rows_of_several_timesteps():
    """Unclipped it is the documents' formula: (x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha) + sqrt(beta) z."""
    diffusion, x_t, t = Diffusion(SMALL), randn(*SHAPE), torch.tensor([7, 0])
    z, tables = noise(7), {name: table[t].reshape(-1, 1, 1, 1) for name, table in diffusion.tables.items()}
    chain = partial(run_chain, diffusion, net, x_t, noise)
    expected = torch.stack([next(chain(timesteps=range(8))).x_t[0], next(chain(timesteps=[0])).x_t[1]])
    torch.testing.assert_close(sampler.step_back(diffusion, net, x_t, t, z), expected)
    beta, scale = tables["beta"], (1 - tables["beta"]).sqrt()
    mean = (x_t - beta / tables["sqrt_one_minus_alpha_bar"] * net(x_t, t)) / scale
    expected = mean + beta.sqrt() * z * (t > 0).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(sampler.step_back(diffusion, net, x_t, t, z, clip=False), expected)
    few = diffusion.respace([3, 9, 19])
    last = sampler.step_back(few, net, x_t, torch.tensor([2, 2]), noise(19))
    torch.testing.assert_close(last, next(run_chain(few, net, x_t, noise)).x_t)


def test_what_is_left_out_is_drawn():
    diffusion, mean, variance = Diffusion(SMALL), torch.full((10_000,), 2.0), torch.tensor(9.0)
    drawn = draw_gaussian(mean, variance)
    assert drawn.mean().item() == pytest.approx(2, abs=0.15)
    assert drawn.std().item() == pytest.approx(3, abs=0.1)
    assert torch.equal(draw_gaussian(mean, variance, mean), 4 * mean)
    x_0, t, eps = torch.zeros(400, 1, 5, 5), torch.full((400,), 19), torch.ones(400, 1, 5, 5)
    spread = diffusion.tables["one_minus_alpha_bar"][19].item()
    assert diffusion.q_sample(x_0, t).var().item() == pytest.approx(spread, abs=0.05)
    x_t = diffusion.q_sample(x_0, t, eps)
    expected = diffusion.compute_losses(net(x_t, t), x_0, x_t, t, eps).mean()
    torch.testing.assert_close(compute_batch_loss(diffusion, net, x_0, t, eps), expected)
    loss = compute_batch_loss(diffusion, lambda x_t, t: torch.zeros_like(x_t), x_0)
    assert loss.item() == pytest.approx(1, abs=0.06)  # the mean of eps^2
    assert sampler.interpolate(diffusion, net, x_0, x_0, 0.5, 9).std() > 0
    assert sampler.step_back(diffusion, net, x_0, t).std() > 0


SOLVER = partial(DPMSolverMultistepScheduler, final_sigmas_type="zero")


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("name, eta, clip, spacing, theirs", [
    *(("ddim", eta, True, "uniform", DDIMScheduler()) for eta in (0.0, 0.5)),
    *(("ddim", eta, False, "uniform", DDIMScheduler(clip_sample=False)) for eta in (0.0, 1.0)),
    *(("dpm++", 0.0, False, spacing, SOLVER()) for spacing in get_args(Spacing)),
    *(("dpm++", 1.0, False, spacing, SOLVER(algorithm_type="sde-dpmsolver++")) for spacing in get_args(Spacing)),
])  # fmt: skip
def test_each_step_is_that_of_diffusers(name, eta, clip, spacing, theirs):
    diffusion, x = Diffusion(), randn(*SHAPE)
    theirs.alphas_cumprod = diffusion.tables["alpha_bar"]  # its own are float32
    if name == "ddim":
        theirs.set_timesteps(50)
        timesteps, how = theirs.timesteps.flip(0).tolist(), {"eta": eta, "use_clipped_model_output": True}
    else:
        timesteps, how = sampler.space_timesteps(diffusion, 20, spacing), {}
        theirs.set_timesteps(timesteps=timesteps[::-1])
    steps = run_chain(diffusion, net, x, noise, sampler=name, eta=eta, timesteps=timesteps, clip=clip)
    for ours, t in zip(steps, timesteps[::-1], strict=True):
        z = noise(t) if t > timesteps[0] else 0 * x
        other = theirs.step(net(x, torch.full((2,), t)), t, x, variance_noise=z, **how).prev_sample
        x = ours.x_t
        torch.testing.assert_close(x, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpm++", 2)])
def test_the_error_on_normal_data_falls_with_the_order_of_the_sampler(name, order):
    """Data N(0, 1/4): x_t = z times the deviation of q(x_t) is the exact ODE, and the exact variance of the SDE.

    Each source of noise of the SDE has a pixel of its own. The last step, of first order, is left out.
    """
    diffusion = Diffusion()
    alpha_bar = diffusion.tables["alpha_bar"]
    deviation = (1 - 0.75 * alpha_bar).sqrt()
    optimal, errors = ((1 - alpha_bar).sqrt() / deviation**2).reshape(-1, 1, 1, 1), []
    for steps in (21, 41, 81, 161):
        timesteps = sampler.space_timesteps(diffusion, steps, "logsnr")
        unit = torch.eye(steps, dtype=torch.float64).reshape(steps, 1, 1, 1, steps)
        x_T = torch.cat([unit[-1], torch.full_like(unit[0], 2)]) * deviation[-1]
        ends = []
        for eta in (1.0, 0.0):
            chain = run_chain(
                diffusion, lambda x_t, t: optimal[t] * x_t, x_T,
                lambda t, unit=unit, timesteps=timesteps: unit[timesteps.index(t) - 1],
                sampler=name, eta=eta, timesteps=timesteps, clip=False,
            )  # fmt: skip
            ends.append([*chain][-2].x_t)
        found = torch.stack([ends[0][0].norm(), ends[1][1, 0, 0, 0] / 2])
        errors.append((found - deviation[0]).abs())
    ratios = torch.stack(errors[:-1]) / torch.stack(errors[1:])
    assert (ratios.log2() - order).abs().max() < 0.25, ratios


def test_spaced_timesteps_hold_both_ends():
    diffusion = Diffusion()
    for spacing in ("uniform", "quadratic", "logsnr"):
        assert sampler.space_timesteps(diffusion, 1, spacing) == [999]
        for steps in (2, 7, 90, 999, 1000):  # where most would be rounded to the same t too
            found = torch.tensor(sampler.space_timesteps(diffusion, steps, spacing))
            assert len(found) == steps and (found[0], found[-1]) == (0, 999) and (found.diff() > 0).all()
    assert sampler.space_timesteps(diffusion, 5) == [0, 250, 500, 749, 999]
    assert sampler.space_timesteps(diffusion, 5, "quadratic") == [0, 62, 250, 562, 999]
    log_snr = diffusion.tables["log_snr"][sampler.space_timesteps(diffusion, 5, "logsnr")]
    torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(4), rtol=0.02, atol=0)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=r"1\.\.1000"):
            sampler.space_timesteps(diffusion, steps)
    with pytest.raises(ValueError, match="logsnr"):
        sampler.space_timesteps(Diffusion(DiffusionConfig(beta_schedule="jsd", predict="x0")), 5, "logsnr")


@pytest.mark.parametrize(
    "how", [{}, {"sampler": "dpm++", "steps": 5, "eta": 0.5}, {"variance": "fixedsmall"}]
)
def test_images_depend_on_their_index_alone(how):
    settings = {"shape": (3, 4, 4), "seed": 5, **how}
    together = sampler.sample(Diffusion(SMALL), net, index=torch.arange(6), **settings)
    assert together.dtype == torch.float32 and together.abs().max() <= 1
    for rows in ([4], [5, 0, 2]):
        alone = sampler.sample(Diffusion(SMALL), net, index=torch.tensor(rows), **settings)
        assert torch.equal(alone, together[rows])
    other = sampler.sample(Diffusion(SMALL), net, index=torch.arange(6), **{**settings, "seed": 6})
    assert not torch.equal(other, together)


def test_sample_is_the_ancestral_chain_fed_by_its_streams():
    index = torch.tensor([3, 8])
    *_, last = run_chain(
        Diffusion(SMALL), net, draw_normal(5, Stream.X_T, 0, index, SHAPE[1:]),
        lambda t: draw_normal(5, Stream.REVERSE, t, index, SHAPE[1:]),
    )  # fmt: skip
    assert torch.equal(sampler.sample(Diffusion(SMALL), net, index=index, shape=SHAPE[1:], seed=5), last.x_t)


def test_interpolation_mixes_latents_row_by_row():
    diffusion = Diffusion(SMALL)
    x_a, x_b, eps = (randn(*SHAPE, seed=s) for s in range(3))
    mixed = sampler.interpolate(diffusion, net, x_a, x_b, torch.tensor([0.0, 0.5]), 12, eps, noise)
    t = torch.tensor([11, 11])
    a, b = diffusion.q_sample(x_a, t, eps), diffusion.q_sample(x_b, t, eps)
    *_, last = run_chain(diffusion, net, torch.stack([a[0], (a[1] + b[1]) / 2]), noise, timesteps=range(12))
    torch.testing.assert_close(mixed, last.x_t)
    apart = sampler.interpolate(diffusion, net, x_a, x_b, 1.0, 12, (eps, -eps), noise)
    torch.testing.assert_close(apart, sampler.interpolate(diffusion, net, x_b, x_b, 0.5, 12, -eps, noise))
    pixels = sampler.interpolate(diffusion, net, x_a, x_b, 0.25, 0, eps, noise)
    torch.testing.assert_close(pixels, 0.75 * x_a + 0.25 * x_b)


def test_guidance_extrapolates_from_no_context_to_the_chosen_one():
    x, t, context = randn(*SHAPE), torch.tensor([3, 5]), torch.tensor([2, 4])
    plain, without = net(x, t, context), net(x, t, torch.tensor([-1, -1]))
    for scale, expected in ((1.0, plain), (0.0, without), (3.0, without + 3 * (plain - without))):
        torch.testing.assert_close(sampler.add_guidance(net, scale, -1)(x, t, context), expected)

    def wide(x_t, t, context):
        return torch.cat([net(x_t, t, context), context.reshape(-1, 1, 1, 1).expand_as(x_t)], dim=1)

    learned = sampler.add_guidance(wide, 3.0, -1)(x, t, context)[:, 3:]
    assert learned.flatten(1).unique(dim=1).tolist() == [[2.0], [4.0]], "variances are of the context alone"


def test_wrong_settings_are_refused():
    diffusion, x = Diffusion(SMALL), randn(*SHAPE)
    with pytest.raises(ValueError, match="unknown sampler 'euler'"):
        next(run_chain(diffusion, net, x, noise, sampler="euler"))
    with pytest.raises(ValueError, match="eta"):
        next(run_chain(diffusion, net, x, noise, sampler="ddim", eta=1.5))
    with pytest.raises(ValueError, match="unknown spacing 'quadradic'"):  # it would be uniform without a word
        sampler.space_timesteps(diffusion, 5, "quadradic")
    for weight, steps, message in ((1.1, 5, "lambda"), (-0.1, 5, "lambda"), (0.5, 21, "steps")):
        with pytest.raises(ValueError, match=message):
            sampler.interpolate(diffusion, net, x, x, weight, steps, x, noise)
