"""The training step: an oracle in float64, slices and parts against the whole, resumption bit for bit."""

import dataclasses
import math
from typing import get_args

import pytest
import torch
from torch import nn

from ddpm import rng
from ddpm.config import DiffusionConfig, Precision, TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.images import from_uint8
from ddpm.kernels import accelerate
from ddpm.networks import NO_LABEL
from ddpm.networks.build import build_network
from ddpm.networks.config import UNetConfig
from ddpm.precision import PreciseNetwork
from ddpm.rng import Stream
from ddpm.training import TrainState, compute_gradients, compute_learning_rate, draw_batch_noise, train_step

CONFIG = TrainConfig(
    steps=100, batch_size=8, accumulate=1, random_flip=True, lr=2e-3, lr_decay="none", warmup_steps=4,
    grad_clip=1.0, ema_decay=(0.9,), ema_warmup=False, label_dropout=0.0, precision="fp32",
)  # fmt: skip
SEED = 11
DIFFUSION = Diffusion(DiffusionConfig(timesteps=50))
UNET = UNetConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), norm_groups=4
)
PIXELS = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
ROWS = torch.arange(8)


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def small_state(settings, seed=3, diffusion=DIFFUSION, **model):
    """A small U-Net whose branches are awake: at its initial weights nearly no gradient passes them."""
    net = build_network(dataclasses.replace(UNET, **model), 8, 1, 1, seed=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return TrainState(settings, net.to(memory_format=torch.channels_last), diffusion.config)


def step(state, settings, rows=ROWS, diffusion=DIFFUSION, **kwargs):
    return train_step(state, diffusion, PIXELS[rows], rows, config=settings, seed=SEED, **kwargs)


def gradients(state):
    return {name: p.grad.clone() for name, p in state.net.named_parameters()}


def assert_close(a, b, rtol=1e-5, atol=1e-7):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


class Affine(nn.Module):
    """eps_theta = w x_t + b: a network whose gradient is known by hand."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.2))
        self.seen = []

    def forward(self, x_t, t, context=None):
        self.seen.append((x_t, t, context, torch.is_autocast_enabled("cpu")))
        self.tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return self.w * x_t + self.b


def oracle(settings, steps):
    """Loss, gradient norm, weights and EMA of Affine after each update, by loops in float64."""
    theta, ema = [0.3, -0.2], [0.3, -0.2]
    m, v, history = [0.0, 0.0], [0.0, 0.0], []
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64), 0)
    for n in range(steps):
        loss, grad, count = 0.0, [0.0, 0.0], PIXELS.numel()
        t = rng.draw_integers(SEED, Stream.TIMESTEP, n, ROWS, 50)
        eps = rng.draw_normal(SEED, Stream.NOISE, n, ROWS, (1, 8, 8)).double()
        flip = rng.draw_integers(SEED, Stream.FLIP, n, ROWS, 2)
        for i in range(8):
            x_0 = PIXELS[i].double() / 127.5 - 1
            x_0 = x_0.flip(2) if flip[i] else x_0
            x_t = alpha_bar[t[i]].sqrt() * x_0 + (1 - alpha_bar[t[i]]).sqrt() * eps[i]
            error = theta[0] * x_t + theta[1] - eps[i]
            loss += float((error**2).sum()) / count
            grad[0] += float((2 * error * x_t).sum()) / count
            grad[1] += float((2 * error).sum()) / count
        norm = math.hypot(*grad)
        grad = [g * min(settings.grad_clip / norm, 1) for g in grad]
        lr = settings.lr * min(n / settings.warmup_steps, 1)
        for k in range(2):
            m[k] = 0.9 * m[k] + 0.1 * grad[k]
            v[k] = 0.999 * v[k] + 0.001 * grad[k] ** 2
            m_hat, v_hat = m[k] / (1 - 0.9 ** (n + 1)), v[k] / (1 - 0.999 ** (n + 1))
            theta[k] -= lr * m_hat / (math.sqrt(v_hat) + 1e-8)
            ema[k] = theta[k] if n == 0 else 0.9 * ema[k] + 0.1 * theta[k]
        history.append((loss, norm, list(theta), list(ema)))
    return history


@pytest.mark.parametrize("grad_clip", [0.05, 100.0])
def test_steps_equal_the_oracle(grad_clip):
    settings = config(lr=0.05, grad_clip=grad_clip)
    state = TrainState(settings, Affine(), DIFFUSION.config)
    for loss, norm, theta, ema in oracle(settings, 12):
        metrics = step(state, settings)
        assert metrics["loss"].item() == pytest.approx(loss, rel=1e-5)
        assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-4)
        assert [state.net.w.item(), state.net.b.item()] == pytest.approx(theta, rel=1e-4)
        average = state.emas[0].state_dict()
        assert [average["w"].item(), average["b"].item()] == pytest.approx(ema, rel=1e-4)


def test_learning_rate():
    paper = config(lr=2e-4, warmup_steps=5000, steps=800_000)
    found = [compute_learning_rate(paper, n) for n in (0, 1, 5000, 799_999)]
    assert found == pytest.approx([0, 4e-8, 2e-4, 2e-4])
    linear = config(lr=1e-3, warmup_steps=0, lr_decay="linear", steps=10)
    assert [compute_learning_rate(linear, n) for n in (0, 5, 9, 10)] == pytest.approx([1e-3, 5e-4, 1e-4, 0])


def test_labels_are_dropped_by_row_and_reach_the_network():
    labels = torch.arange(4000) % 7

    def pass_to_network(context, share=0.25, first=0):
        settings, x_0 = config(label_dropout=share, batch_size=4000), torch.zeros(4000 - first, 1, 1, 1)
        state, rows = TrainState(settings, Affine(), DIFFUSION.config), torch.arange(first, 4000)
        how = {"config": settings, "seed": SEED, "world_size": 2 if first else 1}
        train_step(state, DIFFUSION, x_0, rows, context=context[rows], **how)
        return state.net.seen[0][2]

    some = pass_to_network(labels)
    dropped = some == NO_LABEL
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(some[~dropped], labels[~dropped])
    assert torch.equal(pass_to_network(labels, first=9), some[9:])
    assert torch.equal(pass_to_network(labels, share=0.0), labels)
    vectors = torch.nn.functional.one_hot(labels, 7).float()
    assert torch.equal(pass_to_network(vectors), torch.where(dropped[:, None], 0, vectors))


def test_a_part_of_a_batch_and_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="batch_size=8"):  # its loss and its gradient would be too small
        step(TrainState(CONFIG, Affine(), DIFFUSION.config), CONFIG, ROWS[:3])
    with pytest.raises(ValueError, match="lr: is -1"):
        TrainState(config(lr=-1.0), Affine(), DIFFUSION.config)
    for key, changes in (
        ("steps", {"steps": 0}), ("accumulate", {"accumulate": 9}), ("lr", {"lr": math.nan}),
        ("lr_decay", {"lr_decay": "cosine"}), ("grad_clip", {"grad_clip": 0.0}), ("ema_decay", {"ema_decay": ()}),
        ("ema_decay", {"ema_decay": (0.9, 1.0)}), ("label_dropout", {"label_dropout": 1.5}),
    ):  # fmt: skip
        assert key in [name for name, _ in config(**changes).find_problems()]


@pytest.mark.parametrize("random_flip", [True, False])
def test_bf16_is_inside_the_network_only_and_images_are_flipped_where_asked(random_flip):
    settings = config(precision="bf16", random_flip=random_flip)
    state = TrainState(settings, Affine(), DIFFUSION.config)
    metrics = step(state, settings)
    x_t, t, _, autocast = state.net.seen[0]
    t_drawn, _, eps, flip, *_ = draw_batch_noise(SEED, 0, ROWS, (1, 8, 8), 50, None)
    x_0 = from_uint8(PIXELS)
    x_0 = torch.where(random_flip & flip[:, None, None, None], x_0.flip(3), x_0)
    assert flip.any()
    assert autocast and not torch.is_autocast_enabled("cpu")
    assert x_t.dtype == torch.float32 and metrics["loss"].dtype == torch.float32
    assert torch.equal(x_t, DIFFUSION.q_sample(x_0, t_drawn, eps)) and torch.equal(t, t_drawn)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_tf32_is_on_in_tf32_alone_and_restored(precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision != "tf32")
    settings = config(precision=precision)
    state = TrainState(settings, Affine(), DIFFUSION.config)
    step(state, settings)
    assert state.net.tf32 == (precision == "tf32",) * 2
    net = PreciseNetwork(state.net, precision)
    assert net(torch.zeros(1, 1, 1, 1), torch.zeros(1)).dtype == torch.float32
    assert state.net.tf32 == (precision == "tf32",) * 2
    assert torch.backends.cudnn.allow_tf32 == (precision != "tf32")
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    "accumulate, cuts", [(2, [(0, 4), (4, 8)]), (3, [(0, 3), (3, 8)]), (8, [(0, 1), (1, 8)])]
)
def test_whatever_the_cut_of_the_batch_its_loss_gradient_and_dropped_units_stay(accumulate, cuts):
    settings = config(grad_clip=None)
    whole, again, parts = (small_state(settings, dropout=0.4) for _ in range(3))
    expected = step(whole, settings)
    found = step(parts, dataclasses.replace(settings, accumulate=accumulate))
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert found["grad_norm"].item() == pytest.approx(expected["grad_norm"].item(), rel=1e-5)
    workers, loss = [], 0.0  # whose gradients DDP averages
    for start, stop in cuts:
        worker = small_state(settings, dropout=0.4)
        loss += step(worker, settings, ROWS[start:stop], world_size=len(cuts))["loss"].item() / len(cuts)
        workers.append(gradients(worker))
    workers = {name: sum(its[name] for its in workers) / len(cuts) for name in workers[0]}
    assert loss == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-6)
    assert_close(workers, gradients(whole), rtol=1e-4, atol=1e-6)
    step(again, settings)
    step(plain := small_state(settings), settings)
    assert all(torch.equal(gradients(again)[name], its) for name, its in gradients(whole).items())
    assert any(not torch.allclose(gradients(plain)[name], its) for name, its in gradients(whole).items())


def test_the_number_of_a_step_may_be_a_tensor():
    """A CUDA graph reads it anew at each repetition."""
    found = []
    for number in (None, torch.tensor(5)):
        state = small_state(config(), dropout=0.3)
        state.step = 5 if number is None else 99
        compute_gradients(state, DIFFUSION, PIXELS, ROWS, config=config(), seed=SEED, step=number)
        found.append(gradients(state))
    assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("levels", [1, 2])
def test_levels_that_compute_their_activations_again_give_the_same_bits(levels, precision):
    settings = config(accumulate=3, precision=precision)
    kept, again = (small_state(settings, dropout=0.4, recompute=n) for n in (0, levels))
    assert sum(level.recomputes for level in (*again.net.down, *again.net.up)) == 2 * levels
    for state in (kept, again):
        accelerate(state.net)
        step(state, settings)
    assert all(torch.equal(gradients(again)[name], its) for name, its in gradients(kept).items())


IMPORTANCE = Diffusion(DiffusionConfig(timesteps=3, t_sampling="importance"))


def test_importance_sampling_learns_from_the_whole_batch_and_resumes():
    settings = config(lr=1e-30, batch_size=8)
    state = small_state(settings, diffusion=IMPORTANCE)
    for _ in range(8):  # 64 losses over 3 timesteps: enough for each
        step(state, settings, diffusion=IMPORTANCE)
    sampler = state.t_sampler
    assert int(sampler.counts.sum()) == 64
    assert sampler.compute_probabilities().max() > 0.34  # no longer uniform
    resumed = small_state(settings, diffusion=IMPORTANCE, seed=9)
    resumed.load_state_dict(state.state_dict())
    t, weight, *_ = draw_batch_noise(SEED, 8, ROWS, (1, 8, 8), 3, resumed.t_sampler)
    torch.testing.assert_close(weight, (1 / (3 * sampler.compute_probabilities()[t])).float())
    metrics = step(resumed, settings, diffusion=IMPORTANCE)
    expected = step(state, settings, diffusion=IMPORTANCE)
    assert torch.equal(metrics["loss"], expected["loss"])
    assert torch.equal(resumed.t_sampler.losses, sampler.losses)


def test_importance_weights_reach_loss_and_gradient():
    settings = config(grad_clip=None)
    state = TrainState(settings, Affine(), IMPORTANCE.config)
    state.t_sampler.counts.fill_(10)
    state.t_sampler.losses.copy_(torch.tensor([[1.0], [2.0], [5.0]]).expand(3, 10))
    t_drawn, weight, eps, *_ = draw_batch_noise(SEED, 0, ROWS, (1, 8, 8), 3, state.t_sampler)
    metrics = step(state, settings, diffusion=IMPORTANCE)
    x_t, t, *_ = state.net.seen[0]
    error = 0.3 * x_t - 0.2 - eps
    losses = error.square().mean(dim=(1, 2, 3))
    assert torch.equal(t, t_drawn)
    assert metrics["loss"].item() == pytest.approx((weight * losses).mean().item(), rel=1e-5)
    slope = (weight * (2 * error).mean(dim=(1, 2, 3))).mean()
    assert state.net.b.grad.item() == pytest.approx(slope.item(), rel=1e-4)
    for timestep, kept in enumerate(state.t_sampler.losses):  # the losses without their weights
        assert all(torch.isclose(kept, value, rtol=1e-5).any() for value in losses[t == timestep])


def test_the_state_has_its_names_and_loading_names_what_does_not_fit_and_changes_nothing():
    state = small_state(config(ema_decay=(0.9, 0.99)))
    parts = ("net", "ema.0", "ema.1", "adam.exp_avg", "adam.exp_avg_sq")
    names = {f"{part}.{name}" for part in parts for name in state.net.state_dict()}
    assert state.state_dict().keys() == {"step", "adam.step"} | names
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    wrong = {name: tensor + 1 for name, tensor in before.items()}
    del wrong["net.conv_in.bias"]
    wrong["net.extra"] = torch.zeros(1)
    wrong["net.conv_out.bias"] = torch.zeros(6)
    with pytest.raises(ValueError) as caught:
        state.load_state_dict(wrong)
    message = str(caught.value)
    assert "1 missing (net.conv_in.bias)" in message and "1 unexpected (net.extra)" in message
    assert "net.conv_out.bias is (6,) float32, not (1,) float32" in message and "\n" not in message
    assert all(torch.equal(before[name], tensor) for name, tensor in state.state_dict().items())
    state.net.to(memory_format=torch.contiguous_format)
    with pytest.raises(RuntimeError, match="memory format"):
        step(state, CONFIG)  # it was changed too late
