"""The context U-Net: labels and vectors as context, refusals, control by class, learned."""

import dataclasses

import pytest
import torch

from ddpm.config import DiffusionConfig, TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.networks import NO_LABEL
from ddpm.networks.build import build_network
from ddpm.networks.config import ContextUNetConfig
from ddpm.sampler import add_guidance, sample
from ddpm.training import TrainState, train_step

SMALL = ContextUNetConfig(channels=8, channel_mult=(1, 3, 2), norm_groups=4)
CLASSES = 5


def small(image_size=8, num_classes=CLASSES, seed=0, **changes):
    config = dataclasses.replace(SMALL, **changes)
    net = build_network(config, image_size, 3, 3, seed, num_classes).eval()
    with torch.no_grad():
        net.conv_out.weight *= 1e5  # awake: the first output is near zero
    return net


def noised(count, image_size=8):
    return torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))


def test_a_vector_is_a_context_and_a_label_its_one_hot_row():
    net, x_t, t = small().double(), noised(2).double(), torch.tensor([1, 5])
    vectors = torch.eye(CLASSES, dtype=torch.float64)[[1, 3]]
    with torch.no_grad():
        assert torch.equal(net(x_t, t, torch.tensor([1, 3])), net(x_t, t, vectors))
        assert torch.equal(net(x_t, t), net(x_t, t, torch.zeros(2, CLASSES)))
        mixed = net(x_t, t, 0.8 * vectors + 0.2 * vectors.flip(0))
        assert (mixed - net(x_t, t, vectors)).abs().max() > 1e-8


def test_labels_and_contexts_that_it_does_not_know_are_refused():
    x_t, t = noised(2), torch.tensor([1, 2])
    for label in (-2, CLASSES, 1000):
        with pytest.raises(ValueError, match=f"the label {label}; this network knows 0 to 4, and -1"):
            small()(x_t, t, torch.tensor([0, label]))
    with pytest.raises(ValueError, match="one label per image"):
        small()(x_t, t, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"a float vector per image \(2, 5\)"):
        small()(x_t, t, torch.zeros(2, CLASSES + 1))
    with pytest.raises(ValueError, match="without classes"):
        small(num_classes=0)(x_t, t, torch.tensor([0, 0]))


BARS = 4


def bars(labels, generator):
    """8x8 images of class k: one bright bar (rows 0-1, rows 6-7, columns 0-1, columns 6-7), with noise."""
    images = -torch.ones(BARS, 1, 8, 8)
    images[0, 0, :2], images[1, 0, 6:], images[2, 0, :, :2], images[3, 0, :, 6:] = 1, 1, 1, 1
    noise = 0.1 * torch.randn(len(labels), 1, 8, 8, generator=generator)
    return (images[labels] + noise).clamp(-1, 1), images


def test_learns_to_draw_the_class_that_is_asked_for():
    settings = TrainConfig(
        steps=240, batch_size=16, accumulate=1, random_flip=False, lr=1e-2, lr_decay="linear",
        warmup_steps=10, grad_clip=1.0, ema_decay=(0.99,), ema_warmup=True, label_dropout=0.1, precision="fp32",
    )  # fmt: skip
    diffusion = Diffusion(DiffusionConfig(timesteps=100, beta_end=0.1))
    config = ContextUNetConfig(channels=16, channel_mult=(1, 2))
    net = build_network(config, 8, 1, 1, seed=0, num_classes=BARS, timesteps=len(diffusion))
    state = TrainState(settings, net, diffusion.config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(settings.steps):
        labels = torch.randint(0, BARS, (16,), generator=generator)
        x_0, templates = bars(labels, generator)
        train_step(state, diffusion, x_0, torch.arange(16), config=settings, seed=1, context=labels)
    net.load_state_dict(state.emas[0].state_dict())
    asked = torch.arange(40) % BARS
    images = sample(
        diffusion, add_guidance(net.eval(), 2.0, NO_LABEL), index=torch.arange(40), shape=(1, 8, 8), seed=3,
        sampler="ddim", steps=20, context=asked,
    )  # fmt: skip
    found = torch.cdist(images.flatten(1), templates.flatten(1)).argmin(dim=1)
    assert (found == asked).float().mean() >= 0.8  # chance is 0.25
    assert (images - templates[asked]).abs().mean() < 0.5
