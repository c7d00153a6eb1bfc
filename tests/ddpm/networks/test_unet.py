"""The paper's network: diffusers with copied weights, and each detail that ports get wrong."""

import dataclasses
import math

import pytest
import torch
from diffusers_unet import make_unet, randomise
from torch import nn

from ddpm.kernels import accelerate
from ddpm.networks import NO_LABEL
from ddpm.networks.build import build_network
from ddpm.networks.config import UNetConfig
from ddpm.networks.layers import RowDropout
from ddpm.networks.unet import ResBlock, UNet
from pipeline.store.diffusers_layout import translate_name

SMALL = UNetConfig(channels=16, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=8)


@pytest.mark.parametrize(
    ("changes", "image_size", "channels", "out_channels"),
    [
        ({}, 8, 3, 3),
        ({"attention_resolutions": (8,), "norm_groups": 16}, 8, 1, 2),
        ({"attention_resolutions": (), "num_res_blocks": 1}, 16, 3, 6),
        ({"channel_mult": (1, 2, 2, 2), "attention_resolutions": (16,)}, 32, 3, 3),  # the paper's, narrow
        ({"channel_mult": (1, 3, 2), "attention_resolutions": (4, 8), "num_res_blocks": 3}, 16, 3, 3),
    ],
)
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
    near_zero = []
    for name, module in net.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        assert not module.bias.any()
        receptive = module.weight[0, 0].numel()
        limit = math.sqrt(6 / (receptive * (module.weight.shape[0] + module.weight.shape[1])))
        if name.endswith(UNet.near_zero):
            near_zero.append(name)
            limit *= 1e-5
        largest, spread = module.weight.abs().max().item(), module.weight.std().item()
        assert 0.98 * limit < largest <= limit * (1 + 1e-6), name
        assert spread == pytest.approx(limit / math.sqrt(3), rel=0.03), name
    assert len(near_zero) == 22 + 6 + 1


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
