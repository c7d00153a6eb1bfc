"""The context U-Net: faults of its published versions, each shown to be absent; control by class, learned."""

import dataclasses

import pytest
import torch
from torch import nn

from ddpm.config import DiffusionConfig, TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.networks import NO_LABEL
from ddpm.networks.build import build_network
from ddpm.networks.config import ContextUNetConfig
from ddpm.networks.context_unet import ContextResBlock, ContextUpLevel, Film
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


# ---------------------------------------------------------------------------- faults of published versions


@pytest.mark.parametrize(
    ("image_size", "mult"), [(8, (1, 3, 2)), (12, (1, 1, 2)), (28, (2, 1)), (16, (1, 1, 2, 3, 1))]
)
def test_every_join_is_of_equal_spatial_size(image_size, mult):
    net, joins = small(image_size, channel_mult=mult), []
    for up in (module for module in net.modules() if isinstance(module, ContextUpLevel)):
        up.register_forward_pre_hook(lambda _m, args: joins.append([a.shape for a in args]))
    assert net(noised(2, image_size), torch.tensor([1, 2])).shape == (2, 3, image_size, image_size)
    assert len(joins) == len(mult) - 1
    assert all(h == skip for h, skip in joins)
    sides = [h[-1] for h, _ in joins]
    assert sides == [image_size >> level for level in range(len(mult) - 1, 0, -1)]


def test_residual_block_is_the_shortcut_and_its_branch_over_root_two():
    block, x = ContextResBlock(3, 8, SMALL).eval(), noised(2)
    with torch.no_grad():
        block.norm2.weight.zero_()  # silences the branch: gelu(0) = 0
        torch.testing.assert_close(block(x), block.shortcut(x) / 2**0.5)
    same = ContextResBlock(8, 8, SMALL).eval()
    assert isinstance(same.shortcut, nn.Identity)


# ------------------------------------------------------------------------------------------- time and context


def test_film_scales_by_class_and_shifts_by_time():
    film, h = Film(4, CLASSES, 6), torch.randn(2, 6, 3, 3)
    time, chosen = torch.randn(2, 4), torch.eye(CLASSES)[[1, 3]]
    with torch.no_grad():
        difference = film(h, time, chosen) - film(torch.zeros_like(h), time, chosen)
        expected = h * (1 + film.scale(chosen)[:, :, None, None])
        torch.testing.assert_close(difference, expected)
        shift = film(torch.zeros_like(h), time, chosen)
        torch.testing.assert_close(shift, film.shift(time)[:, :, None, None].expand_as(h))


def test_pooled_vector_is_the_mean_over_all_pixels():
    net, h = small(16), torch.randn(2, 16, 4, 4)
    permuted = h.flatten(2)[:, :, torch.randperm(16)].reshape(h.shape)
    torch.testing.assert_close(net.middle(h), net.middle(permuted))
    assert net.middle(h).shape == h.shape


def test_rows_are_independent_unless_batch_norm_trains():
    x_t, t, labels = noised(3), torch.tensor([1, 5, 9]), torch.tensor([0, 1, 2])
    batch, group = small().train(), small(norm="group").train()
    with torch.no_grad():
        alone = group(x_t[:1], t[:1], labels[:1])
        torch.testing.assert_close(group(x_t, t, labels)[:1], alone, rtol=1e-4, atol=1e-5)
        assert (batch(x_t, t, labels)[:1] - batch(x_t[:1], t[:1], labels[:1])).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("label", [-2, CLASSES, 1000])
def test_unknown_labels_are_refused(label):
    with pytest.raises(ValueError, match=f"context has the label {label}; this network knows 0 to 4, and -1"):
        small()(noised(2), torch.tensor([1, 2]), torch.tensor([0, label]))


def test_context_of_another_shape_or_for_no_classes_is_refused():
    with pytest.raises(ValueError, match="one label per image"):
        small()(noised(2), torch.tensor([1, 2]), torch.tensor([0]))
    with pytest.raises(ValueError, match="without classes"):
        small(num_classes=0)(noised(2), torch.tensor([1, 2]), torch.tensor([0, 0]))


# ---------------------------------------------------------------------------------------------------- learning

BARS = 4


def bars(labels, generator):
    """8x8 images of class k: one bright bar (rows 0-1, rows 6-7, columns 0-1, columns 6-7), with noise."""
    images = -torch.ones(BARS, 1, 8, 8)
    images[0, 0, :2], images[1, 0, 6:], images[2, 0, :, :2], images[3, 0, :, 6:] = 1, 1, 1, 1
    noise = 0.1 * torch.randn(len(labels), 1, 8, 8, generator=generator)
    return (images[labels] + noise).clamp(-1, 1), images


def test_learns_to_draw_the_class_that_is_asked_for():
    settings = TrainConfig(
        steps=120, batch_size=32, accumulate=1, random_flip=False, lr=1e-2, lr_decay="linear",
        warmup_steps=10, grad_clip=1.0, ema_decay=(0.99,), ema_warmup=True, label_dropout=0.1, precision="fp32",
    )  # fmt: skip
    diffusion = Diffusion(DiffusionConfig(timesteps=100, beta_end=0.1))
    config = ContextUNetConfig(channels=16, channel_mult=(1, 1, 2))
    net = build_network(config, 8, 1, 1, seed=0, num_classes=BARS)
    state = TrainState(settings, net, diffusion.config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(settings.steps):
        labels = torch.randint(0, BARS, (32,), generator=generator)
        x_0, templates = bars(labels, generator)
        train_step(state, diffusion, x_0, torch.arange(32), config=settings, seed=1, context=labels)
    net.load_state_dict(state.emas[0].state_dict())
    asked = torch.arange(40) % BARS
    images = sample(
        diffusion, add_guidance(net.eval(), 2.0, NO_LABEL), index=torch.arange(40), shape=(1, 8, 8), seed=3,
        sampler="ddim", steps=20, context=asked,
    )  # fmt: skip
    found = torch.cdist(images.flatten(1), templates.flatten(1)).argmin(dim=1)
    assert (found == asked).float().mean() >= 0.8  # chance is 0.25
    assert (images - templates[asked]).abs().mean() < 0.5
