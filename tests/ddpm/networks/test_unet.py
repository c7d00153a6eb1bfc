"""The paper's network: diffusers with copied weights, each detail that ports get wrong, and dropout by keys."""

import dataclasses
import math

import pytest
import torch
from diffusers_unet import make_unet, randomise
from torch import nn

from ddpm import rng
from ddpm.kernels import accelerate, cuda
from ddpm.networks import NO_LABEL
from ddpm.networks.build import build_network
from ddpm.networks.config import UNetConfig
from ddpm.networks.layers import RowDropout, set_dropout_keys
from ddpm.networks.unet import ResBlock, UNet
from ddpm.rng import Stream
from pipeline.store.diffusers_layout import translate_name

SMALL = UNetConfig(channels=16, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=8)


@pytest.mark.parametrize(("changes", "image_size", "channels", "out_channels"), [
    ({}, 8, 3, 3),
    ({"attention_resolutions": (8,), "norm_groups": 16}, 8, 1, 2),
    ({"attention_resolutions": (), "num_res_blocks": 1}, 16, 3, 6),
    ({"channel_mult": (1, 2, 2, 2), "attention_resolutions": (16,)}, 32, 3, 3),  # the paper's, narrow
    ({"channel_mult": (1, 3, 2), "attention_resolutions": (4, 8), "num_res_blocks": 3}, 16, 3, 3),
])  # fmt: skip
@pytest.mark.parametrize("input_scale", [1.0, 1e-3])  # small activations show the norms' eps
@pytest.mark.parametrize("route", [lambda net: net, accelerate], ids=["plain", "accelerated"])
def test_equals_diffusers(changes, image_size, channels, out_channels, input_scale, route):
    config = dataclasses.replace(SMALL, **changes)
    net = route(randomise(UNet(config, image_size, channels, out_channels)))
    with torch.no_grad():
        for p in net.conv_in.parameters():
            p *= input_scale
    twin = make_unet(config, image_size, channels, out_channels).eval()
    twin.load_state_dict({translate_name(name): p for name, p in net.state_dict().items()})
    x_t = torch.randn(3, channels, image_size, image_size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 1, 999])
    with torch.no_grad():
        ours, theirs = net(x_t, t), twin(x_t, t).sample
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_initial_weights():
    net = build_network(UNetConfig(attention_resolutions=(16,)), 32, 3, 3, seed=3)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for name, module in layers.items():
        assert not module.bias.any()
        fans = module.weight[0, 0].numel() * sum(module.weight.shape[:2])
        limit = math.sqrt(6 / fans) * (1e-5 if name.endswith(UNet.near_zero) else 1)
        largest, spread = module.weight.abs().max().item(), module.weight.std().item()
        assert 0.98 * limit < largest <= limit * (1 + 1e-6), name
        assert spread == pytest.approx(limit / math.sqrt(3), rel=0.03), name
    assert sum(name.endswith(UNet.near_zero) for name in layers) == 22 + 6 + 1


def test_dropout_is_elementwise_before_the_second_convolution_and_nowhere_else():
    net = UNet(dataclasses.replace(SMALL, channels=32, dropout=0.5), 8, 3, 3).train()
    blocks = [m for m in net.modules() if isinstance(m, ResBlock)]
    assert sum(isinstance(m, nn.Dropout) for m in net.modules()) == len(blocks)
    assert {type(m) for m in net.modules() if "Dropout" in type(m).__name__} == {RowDropout}
    block, seen = blocks[0], {}
    block.norm2.register_forward_hook(lambda _m, _i, out: seen.update(norm=out))
    block.conv2.register_forward_pre_hook(lambda _m, args: seen.update(conv=args[0]))
    net(torch.randn(8, 3, 8, 8), torch.arange(8))
    kept = seen["conv"] != 0
    torch.testing.assert_close(seen["conv"][kept], 2 * nn.functional.silu(seen["norm"])[kept])
    share_per_channel = kept.float().mean(dim=(2, 3))  # whole channels would give 0 or 1
    assert share_per_channel.min() > 0.1 and share_per_channel.max() < 0.9
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_embedding_of_a_label_is_added_to_that_of_the_time():
    config = dataclasses.replace(SMALL, class_conditional=True)
    plain, net = randomise(UNet(SMALL, 8, 3, 3)), randomise(UNet(config, 8, 3, 3, num_classes=3))
    x_t, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([5, 999]), torch.tensor([2, NO_LABEL])
    net.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(net(x_t, t), plain(x_t, t))
        assert torch.equal(net(x_t, t, labels)[1:], plain(x_t, t)[1:])
        plain.time_mlp[2].bias += net.label_emb.weight[:, 2]
        torch.testing.assert_close(net(x_t, t, labels)[:1], plain(x_t, t)[:1])


def drop(x: torch.Tensor, rows: torch.Tensor, p: float = 0.1, step: int = 0) -> torch.Tensor:
    layer = RowDropout(p)
    layer.keys = rng.draw_words(0, Stream.DROPOUT, step, rows, 2).T.reshape(2, -1, 1)
    return layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("p", [0.1, 0.4])
def test_dropout_drops_so_many_and_scales_the_rest(memory_format, dtype, p):
    torch.manual_seed(0)
    x = (1 + torch.rand(4, 33, 63, 31)).to(dtype).to(memory_format=memory_format).requires_grad_()
    y = drop(x, torch.arange(4), p)
    kept, count = y != 0, x.numel()
    assert float(kept.sum()) == pytest.approx((1 - p) * count, abs=4 * math.sqrt(p * (1 - p) * count))
    torch.testing.assert_close(y[kept].float(), x[kept].float() / (1 - p), rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, kept) and torch.equal(drop(x.contiguous(), torch.arange(4), p), y)
    # Decisions are independent: of neighbouring channels, of pixels, of images, of steps.
    flat = (~kept).permute(0, 2, 3, 1).flatten().double()
    for lag in (1, 2, 3, 4, 33, 33 * 31, 33 * 31 * 63):
        assert float((flat[:-lag] * flat[lag:]).mean()) == pytest.approx(p * p, abs=5 * p / math.sqrt(count))
    other = (drop(x, torch.arange(4), p, step=1) == 0).permute(0, 2, 3, 1).flatten().double()
    assert float((flat * other).mean()) == pytest.approx(p * p, abs=5 * p / math.sqrt(count))


def test_without_keys_and_in_evaluation_it_is_torchs():
    x, layer = torch.ones(2, 3, 4, 4), RowDropout(0.5)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    assert torch.equal(found, torch.nn.functional.dropout(x, 0.5))
    layer.keys = torch.zeros(2, 2, 1, dtype=torch.int32)
    assert torch.equal(layer.eval()(x), x)


def test_the_masks_of_a_gpu_are_those_of_the_layers():
    """Run on the CPU: masks of a byte, drawn together from the second step on, drop the same numbers both ways."""
    sizes = [(5, 3, 3), (4, 2, 2), (5, 3, 3)]
    layers = [cuda.ByteDropout(0.3) for _ in range(3)]
    for number in range(2):
        keys = rng.draw_words(0, Stream.DROPOUT, number, torch.arange(6), 6).T.reshape(3, 2, 6, 1)
        with set_dropout_keys(layers, keys):
            cuda.draw_masks(layers)
            assert [layer.kept is not None for layer in layers] == [number > 0] * 3
            for layer, its_keys, size in zip(layers, keys, sizes, strict=True):
                x = torch.randn(6, *size).to(memory_format=torch.channels_last).requires_grad_()
                plain = RowDropout(0.3)
                plain.keys = its_keys
                found, expected = layer(x), plain(x)
                assert torch.equal(found, expected)
                gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
                assert torch.equal(*gradients)
                assert layer.kept is None
