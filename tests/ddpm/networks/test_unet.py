"""The paper's network: exact counts, diffusers with copied weights, and each detail that ports get wrong."""

import dataclasses
import math

import pytest
import torch
from conftest import assert_refused_by_name
from diffusers import UNet2DModel
from torch import nn

from ddpm.kernels import accelerate
from ddpm.networks.build import build_network
from ddpm.networks.config import UNetConfig
from ddpm.networks.layers import embed_timesteps
from ddpm.networks.unet import (
    Downsample,
    ResBlock,
    SelfAttention,
    TransposedConvUpsample,
    UNet,
)
from pipeline.store.diffusers_layout import translate_name

SMALL = UNetConfig(channels=16, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=8)
LARGE_MULT = (1, 1, 2, 2, 4, 4)


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomised(net, scale=0.3, seed=0):
    """Replace every weight, the norms' and the near-zero ones too, so that no branch hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = max(p[0].numel(), 1) if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * scale * math.sqrt(4 / fan))
            if "norm" in name and name.endswith("weight"):
                p += 1
    return net.eval()


# ------------------------------------------------------------------------------------------ parameter counts


@pytest.mark.parametrize(
    ("config", "image_size", "out_channels", "expected"),
    [
        (UNetConfig(), 32, 3, 35_746_307),  # paper, App. B: 35.7 million
        (UNetConfig(), 32, 6, 35_749_766),
        (UNetConfig(channel_mult=LARGE_MULT), 256, 3, 113_673_219),  # paper: 114 million
        (UNetConfig(channels=192, channel_mult=LARGE_MULT), 256, 3, 255_677_955),  # paper: 256 million
    ],
)
def test_parameter_count(config, image_size, out_channels, expected):
    assert count(build_network(config, image_size, 3, out_channels, seed=0, device="meta")) == expected


def test_parameter_count_of_each_part():
    net = build_network(UNetConfig(), 32, 3, 3, seed=0, device="meta")
    assert count(net.time_mlp) == 328_704
    assert count(net.conv_in) == 3_584
    assert [count(level) for level in net.down] == [870_272, 3_480_320, 3_215_104, 2_625_024]
    assert count(net.middle) == 2_888_704
    assert [count(level) for level in net.up] == [6_692_608, 6_692_608, 7_155_712, 1_789_952]
    assert count(net.norm_out) + count(net.conv_out) == 3_715


# ------------------------------------------------------------------------------------------------ diffusers


def diffusers_twin(net, image_size, in_channels, out_channels):
    """diffusers' network of the same shape, with the weights of `net`."""
    config = net.config
    attended = [r in config.attention_resolutions for r in config.list_sides(image_size)]
    twin = UNet2DModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        downsample_padding=0,
        norm_eps=1e-6,
        norm_num_groups=config.norm_groups,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
    )
    twin.load_state_dict({translate_name(name): p for name, p in net.state_dict().items()})
    return twin.eval()


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
    net = route(randomised(UNet(config, image_size, channels, out_channels)))
    with torch.no_grad():
        for p in net.conv_in.parameters():
            p *= input_scale
    twin = diffusers_twin(net, image_size, channels, out_channels)
    x_t = torch.randn(3, channels, image_size, image_size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 1, 999])
    with torch.no_grad():
        ours, theirs = net(x_t, t), twin(x_t, t).sample
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------- details, one by one


def test_timestep_embedding_is_all_sines_then_all_cosines_of_raw_t():
    half = 64
    embedding = embed_timesteps(torch.tensor([0, 1, 999]), 2 * half)
    assert embedding.dtype == torch.float32
    assert embedding[0].tolist() == [0.0] * half + [1.0] * half
    for row, t in enumerate([0, 1, 999]):
        angles = [t * 10000 ** (-i / (half - 1)) for i in range(half)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert embedding[row].tolist() == pytest.approx(expected, abs=1e-4)
    assert embedding[1, half - 1].item() == pytest.approx(1e-4, rel=1e-5)  # half - 1, not half


def test_downsampling_pads_right_and_bottom_only():
    down = Downsample(1)
    with torch.no_grad():
        down.conv.weight.zero_()[0, 0, 0, 0] = 1.0  # picks the top-left pixel of each window
        down.conv.bias.zero_()
        image = torch.arange(16.0).reshape(1, 1, 4, 4)
        assert down(image).flatten().tolist() == [0, 2, 8, 10]


def test_norm_eps_everywhere():
    norms = [m for m in UNet(SMALL, 8, 3, 3).modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 2 * 12 + 6 + 1
    assert {m.eps for m in norms} == {1e-6}


def test_three_decoder_blocks_each_with_attention():
    net = build_network(UNetConfig(), 32, 3, 3, seed=0, device="meta")
    attentions = [[isinstance(a, SelfAttention) for a in level.attentions] for level in net.up]
    assert attentions == [[False] * 3, [False] * 3, [True] * 3, [False] * 3]
    assert sum(isinstance(m, SelfAttention) for m in net.modules()) == 6
    assert sum(isinstance(m, ResBlock) for m in net.modules()) == 22


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


def test_first_output_is_nearly_but_not_exactly_zero():
    net = build_network(SMALL, 8, 3, 3, seed=0).eval()
    output = net(torch.randn(2, 3, 8, 8), torch.tensor([0, 999]))
    assert 0 < output.abs().max() < 1e-3


def test_dropout_is_elementwise_before_the_second_convolution_and_nowhere_else():
    net = UNet(dataclasses.replace(SMALL, channels=32, dropout=0.5), 8, 3, 3).train()
    blocks = [m for m in net.modules() if isinstance(m, ResBlock)]
    assert sum(isinstance(m, nn.Dropout) for m in net.modules()) == len(blocks)
    assert {type(m) for m in net.modules() if "Dropout" in type(m).__name__} == {nn.Dropout}
    block, seen = blocks[0], {}
    block.norm2.register_forward_hook(lambda _m, _i, out: seen.update(norm=out))
    block.conv2.register_forward_pre_hook(lambda _m, args: seen.update(conv=args[0]))
    net(torch.randn(8, 3, 8, 8), torch.arange(8))
    kept = seen["conv"] != 0
    torch.testing.assert_close(seen["conv"][kept], 2 * nn.functional.silu(seen["norm"])[kept])
    share_per_channel = kept.float().mean(dim=(2, 3))  # whole channels would give 0 or 1
    assert share_per_channel.min() > 0.1 and share_per_channel.max() < 0.9
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_evaluation_mode_has_no_dropout():
    net = randomised(UNet(dataclasses.replace(SMALL, dropout=0.5), 8, 3, 3))
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 6])
    assert torch.equal(net(x_t, t), net(x_t, t))


def test_output_is_float32_under_autocast_and_close_to_it():
    net = randomised(UNet(SMALL, 8, 3, 3))
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 999])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = net(x_t, t)
    assert low.dtype == torch.float32
    full = net(x_t, t)
    assert 0 < (low - full).abs().max() < 0.1 * full.abs().max()


def test_memory_format_does_not_change_the_result():
    net = randomised(UNet(SMALL, 8, 3, 3))
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 999])
    expected = net(x_t, t)
    found = net.to(memory_format=torch.channels_last)(x_t, t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_graph_break():
    net = randomised(UNet(SMALL, 8, 3, 3))
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 999])
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x_t, t), net(x_t, t))


def test_transposed_upsampling():
    config = UNetConfig(
        channels=8, channel_mult=(1, 2, 4), attention_resolutions=(8, 4), norm_groups=4, resample="transposed"
    )
    net = UNet(config, 16, 3, 3)
    assert sum(isinstance(m, TransposedConvUpsample) for m in net.modules()) == 2
    assert net(torch.randn(2, 3, 16, 16), torch.tensor([0, 1])).shape == (2, 3, 16, 16)


# -------------------------------------------------------------------------------------- construction, faults


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator_be():
    before = torch.get_rng_state()
    first, again, other = (build_network(SMALL, 8, 3, 3, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_every_parameter_learns():
    net = randomised(UNet(SMALL, 8, 3, 3))
    net(torch.randn(2, 3, 8, 8), torch.tensor([5, 999])).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "image_size", "key"),
    [
        ({"norm_groups": 5}, 8, "norm_groups"),
        ({"norm_groups": 0}, 8, "norm_groups"),
        ({"dropout": 1.0}, 8, "dropout"),
        ({"channels": 7, "norm_groups": 7}, 8, "channels"),
        ({"channel_mult": ()}, 8, "channel_mult"),
        ({"channel_mult": (1, 2, 2)}, 10, "channel_mult"),
        ({"attention_resolutions": (16,)}, 8, "attention_resolutions"),
        ({"num_res_blocks": 0}, 8, "num_res_blocks"),
        ({"resample": "bicubic"}, 8, "resample"),
    ],
)
def test_problems_name_the_key(changes, image_size, key):
    assert_refused_by_name(UNet, dataclasses.replace(SMALL, **changes), image_size, key)


def test_the_papers_settings_have_no_problems():
    assert UNetConfig().find_problems(32) == []
    assert UNetConfig(channel_mult=LARGE_MULT).find_problems(256) == []


def test_labels_are_refused():
    with pytest.raises(ValueError, match="takes no labels"):
        build_network(SMALL, 8, 3, 3, seed=0, num_classes=10)
    with pytest.raises(ValueError, match="takes no labels"):
        UNet(SMALL, 8, 3, 3)(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
