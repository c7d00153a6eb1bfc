"""The process and its losses: the authors' numbers, diffusers, closed forms, and faults that once were."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from test_oracle import SMALL, randn

from ddpm.config import DiffusionConfig
from ddpm.diffusion import Diffusion
from ddpm.schedules import get_betas

PAPER = DiffusionConfig()
SHAPE = (4, 3, 2, 2)


def triple(t: torch.Tensor, diffusion: Diffusion) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_0 = (torch.arange(len(t) * 12, dtype=torch.float64).reshape(-1, 3, 2, 2) * 7 % 256) / 127.5 - 1
    eps = randn(*x_0.shape)
    return x_0, diffusion.q_sample(x_0, t, eps), eps


@pytest.mark.parametrize("t, golden", [
    (0, 0.9999), (1, 0.9997800920720721), (249, 0.5240853738253606), (499, 0.07858724288177824),
    (749, 0.0033505504389367744), (998, 4.118193638138445e-05), (999, 4.035829765375676e-05),
])  # fmt: skip
def test_alpha_bar_golden_values(t, golden):
    assert Diffusion().tables["alpha_bar"][t].item() == pytest.approx(golden, rel=1e-12)


def test_betas_of_ones_own_take_the_place_of_the_schedule():
    own = Diffusion(replace(PAPER, predict="v"), betas=Diffusion().tables["beta"][:500])
    assert len(own) == 500 and own.config.predict == "v"
    assert torch.equal(own.tables["alpha_bar"], Diffusion().tables["alpha_bar"][:500])
    sigmoid = 1e-4 + 0.0199 * torch.sigmoid(torch.linspace(6, -6, 100))  # float32, and descending
    assert torch.equal(Diffusion(betas=sigmoid).tables["beta"], sigmoid.double())
    with pytest.raises(ValueError, match=r"betas: is 1.5; it must be at least 1e-12 and below 1$"):
        Diffusion(betas=torch.tensor([0.1, 1.5, 2.0]))
    with pytest.raises(ValueError, match="betas: is 1e-17"):  # 1 - beta is 1, and tables are not finite
        Diffusion(betas=torch.tensor([1e-17, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("variance, name", [("fixedlarge", "fixed_large"), ("fixedsmall", "fixed_small")])
@pytest.mark.parametrize("predict, name_there", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_reverse_steps_agree_with_diffusers(predict, name_there, variance, name):
    diffusion = Diffusion(replace(PAPER, predict=predict, variance=variance))
    theirs = DDPMScheduler(beta_schedule="linear", variance_type=name, prediction_type=name_there)
    alpha_bar = diffusion.tables["alpha_bar"]
    torch.testing.assert_close(theirs.alphas_cumprod.double(), alpha_bar, rtol=1e-4, atol=0)
    theirs.alphas_cumprod = diffusion.tables["alpha_bar"]  # float64, so that the formulas are compared
    theirs.betas, theirs.alphas = diffusion.tables["beta"], 1 - diffusion.tables["beta"]
    x_t, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for i in (0, 1, 2, 500, 998, 999):
        t = torch.full((2,), i)
        torch.testing.assert_close(diffusion.q_sample(x_t, t, output), theirs.add_noise(x_t, output, t))
        ours = diffusion.p_mean_variance(output, x_t, t)
        z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        step = ours.mean + (torch.exp(0.5 * ours.log_variance) * z if i else 0)
        there = theirs.step(output, i, x_t, torch.Generator().manual_seed(i))
        torch.testing.assert_close(ours.x_0, there.pred_original_sample, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(step, there.prev_sample, rtol=1e-10, atol=1e-10)


def test_mean_prediction_is_used_as_it_is_and_only_its_estimate_is_clipped():
    diffusion, t = Diffusion(replace(PAPER, predict="mean")), torch.tensor([0, 1, 500, 999])
    output = 5 * randn(*SHAPE)
    p = diffusion.p_mean_variance(output, randn(*SHAPE, seed=1), t, clip=True)
    assert torch.equal(p.mean, output) and p.x_0.abs().max() == 1
    # Respaced it goes through its estimate: trained on full steps, it says x_0 by their coefficients.
    diffusion, kept = Diffusion(replace(SMALL, predict="mean")), torch.tensor([0, 9, 19])
    x_0, x_t, _ = triple(kept, diffusion)
    mean = diffusion.q_posterior(x_0, x_t, kept).mean
    p = diffusion.respace(kept).p_mean_variance(mean, x_t, torch.arange(3), clip=False)
    torch.testing.assert_close(p.x_0, x_0)
    torch.testing.assert_close(p.mean, diffusion.respace(kept).q_posterior(x_0, x_t, torch.arange(3)).mean)


@pytest.mark.parametrize("end, fixed", [(-1.0, "fixedsmall"), (1.0, "fixedlarge")])
def test_learned_range_at_its_ends_is_the_fixed_variance(end, fixed):
    """At t = 0 its upper end is another one."""
    diffusion = Diffusion(replace(PAPER, variance="learned_range", loss="hybrid"))
    t = torch.arange(1, 1000)
    _, x_t, eps = triple(t, diffusion)
    output = torch.cat([eps, torch.full_like(eps, end)], dim=1)
    learned = diffusion.p_mean_variance(output, x_t, t)
    expected = diffusion.p_mean_variance(output, x_t, t, variance=fixed)
    torch.testing.assert_close(learned.log_variance, expected.log_variance.expand_as(eps), rtol=1e-12, atol=0)
    assert torch.equal(learned.mean, expected.mean)
    middle = diffusion.p_mean_variance(torch.cat([eps, torch.zeros_like(eps)], 1), x_t, t).log_variance
    both = diffusion.tables["log_fixedsmall"] + diffusion.tables["log_fixedlarge"]
    torch.testing.assert_close(middle[:, 0, 0, 0], both[1:] / 2)
    plain = Diffusion(replace(PAPER, variance="learned", loss="vlb"))
    assert torch.equal(plain.p_mean_variance(output, x_t, t).log_variance, output[:, 3:]), "the second half"
    assert plain.count_output_channels(3) == 6 and Diffusion().count_output_channels(3) == 3


def test_simple_loss_is_the_mean_square_of_each_prediction():
    t = torch.tensor([0, 7, 500, 999])
    x_0, x_t, eps = triple(t, Diffusion())
    output = randn(*SHAPE, seed=2)
    alpha_bar = Diffusion().tables["alpha_bar"][t].reshape(-1, 1, 1, 1)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
    targets = {"eps": eps, "x0": x_0, "v": v, "mean": Diffusion().q_posterior(x_0, x_t, t).mean}
    for predict, target in targets.items():
        loss = Diffusion(replace(PAPER, predict=predict)).compute_losses(output, x_0, x_t, t, eps)
        expected = [((output[n] - target[n]) ** 2).sum().item() / 12 for n in range(4)]
        assert loss.tolist() == pytest.approx(expected)
    x_0, x_t, eps = (tensor.float() for tensor in (x_0, x_t, eps))
    loss = Diffusion().compute_losses(eps.bfloat16(), x_0, x_t, t, eps)
    assert loss.dtype == torch.float32 and loss.max() < 1e-4, "of a bfloat16 output"


def test_vlb_loss_for_eps_is_the_weighted_square_of_eq_12():
    diffusion = Diffusion(replace(PAPER, loss="vlb"))
    t = torch.tensor([1, 7, 500, 999])
    x_0, x_t, eps = triple(t, diffusion)
    output = eps + 0.3 * randn(*SHAPE, seed=2)
    loss = diffusion.compute_losses(output, x_0, x_t, t, eps)
    beta, alpha_bar = diffusion.tables["beta"][t], diffusion.tables["alpha_bar"][t]
    weight = beta**2 / (2 * beta * (1 - beta) * (1 - alpha_bar))
    constant = diffusion.compute_losses(eps, x_0, x_t, t, eps)  # what the two variances differ by
    squares = ((output - eps) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close((loss - constant) * math.log(2), weight * squares, rtol=1e-8, atol=1e-12)


def test_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_by_the_simple_loss():
    config = replace(PAPER, variance="learned_range", loss="hybrid", timesteps=4000)
    diffusion = Diffusion(config)
    t = torch.tensor([0, 7, 500, 3999])
    x_0, x_t, eps = triple(t, diffusion)
    output = (0.3 * randn(4, 6, 2, 2, seed=2)).requires_grad_()
    loss = diffusion.compute_losses(output, x_0, x_t, t, eps)
    vlb = Diffusion(replace(config, loss="vlb")).compute_losses(output, x_0, x_t, t, eps)
    simple = ((output[:, :3] - eps) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, simple + 4 * vlb)
    (gradient,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
    (of_simple,) = torch.autograd.grad(simple.sum(), output, retain_graph=True)
    (of_vlb,) = torch.autograd.grad(4 * vlb.sum(), output)
    torch.testing.assert_close(gradient[:, :3], of_simple[:, :3])
    torch.testing.assert_close(gradient[:, 3:], of_vlb[:, 3:])
    assert (gradient[1:3, 3:] != 0).all()


@pytest.mark.parametrize("changes, key", [
    ({"timesteps": 1}, "timesteps"), ({"beta_start": 0.0}, "beta_start"), ({"beta_end": 1.0}, "beta_end"),
    ({"beta_start": 0.03}, "beta_start"), ({"beta_schedule": "sigmoid"}, "beta_schedule"),
    ({"predict": "velocity"}, "predict"), ({"beta_schedule": "jsd"}, "predict"), ({"loss": "hybrid"}, "loss"),
    ({"variance": "learned"}, "loss"), ({"betas": (0.1, 0.2)}, "betas"), ({"betas": (1.0,) * 1000}, "betas"),
    ({"betas": (math.nan,) * 1000}, "betas"),
    ({"variance": "learned_range"}, "loss"), ({"t_sampling": "sometimes"}, "t_sampling"),
])  # fmt: skip
def test_problems_name_their_key_and_no_process_is_built(changes, key):
    config = replace(PAPER, **changes)
    ((name, message),) = config.find_problems()
    assert name == key and "\n" not in message
    with pytest.raises(ValueError, match=key):
        Diffusion(config)


def test_wrong_shapes_and_types_are_refused_clearly():
    diffusion, learned = Diffusion(), replace(PAPER, variance="learned", loss="vlb")
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    short, hybrid = Diffusion(learned).respace([0, 500]), Diffusion(replace(learned, loss="hybrid"))
    for message, call in (
        (r"shapes differ: x_0 .* eps", lambda: diffusion.q_sample(x, t, x[:, :1])),
        ("t must be int64 of shape", lambda: diffusion.q_sample(x, t.float(), x)),
        ("t must be int64 of shape", lambda: diffusion.q_sample(x, t[:1], x)),
        ("floats", lambda: diffusion.q_sample(x.long(), t, x)),  # whose tables would be 0 and 1
        ("does not fit", lambda: diffusion.p_mean_variance(x[:, :2], x, t)),
        ("a network of 6 output channels", lambda: diffusion.p_mean_variance(x, x, t, variance="learned")),
        ("a network of 6 output channels", lambda: hybrid.compute_losses(x, x, x, t, x)),
        ("full steps only", lambda: short.p_mean_variance(torch.zeros(2, 6, 4, 4), x, t)),
        ("ascend within", lambda: diffusion.respace([])),
        ("ascend within", lambda: diffusion.respace([3, 3])),
        ("ascend within", lambda: diffusion.respace([-1, 4])),
        ("ascend within", lambda: diffusion.respace([0, 1000])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


LINEAR_4000 = {"timesteps": 4000, "beta_start": 2.5e-5, "beta_end": 0.005}


@pytest.mark.parametrize("settings, lowest, highest", [
    ({}, -9.816725, -9.210340),
    ({"timesteps": 4000, "beta_schedule": "cosine"}, -12.204540, -11.526430),
    (LINEAR_4000, -11.265783, -10.596635),
])  # fmt: skip
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
    for steps in ([5], [0, 9, 19], list(range(19))):  # and so it ranges in every chain
        chain = diffusion.respace(steps)
        x, t = torch.zeros(len(steps), 1, 1, 1, dtype=torch.float64), torch.arange(len(steps))
        highest = chain.p_mean_variance(torch.cat([x, torch.ones_like(x)], 1), x, t).log_variance
        torch.testing.assert_close(highest.flatten(), chain.tables["beta"].log())


@pytest.mark.parametrize("settings, words", [
    ({"timesteps": 100}, ("keeps 36%", "beta_start=0.001 beta_end=0.2", "T=100")),
    ({"timesteps": 500, "beta_schedule": "quad"}, ("keeps 2.7%",)),
    ({"beta_end": 0.01}, ("keeps 0.63%", "beta_end=0.02")),
    ({"timesteps": 10}, ("keeps 90%", "raise diffusion.timesteps")),
    ({"timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}, ()),
    *(({"beta_schedule": schedule}, ()) for schedule in ("linear", "quad", "const", "warmup10", "warmup50")),
    ({"timesteps": 2, "beta_schedule": "cosine"}, ()),
    ({"timesteps": 2, "beta_schedule": "jsd", "predict": "mean", "loss": "vlb"}, ()),
    (LINEAR_4000, ()),
])  # fmt: skip
def test_a_signal_that_is_left_in_the_last_step_is_a_warning(settings, words):
    found = (process := DiffusionConfig(**settings)).list_warnings()
    assert process.compute_last_alpha_bar() == pytest.approx(float((1 - get_betas(process)).prod()), 1e-9)
    assert len(found) == bool(words) and all(word in found[0] for word in words)
