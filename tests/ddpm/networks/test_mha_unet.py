"""The multi-head-attention U-Net: faults of its published versions, each shown to be absent."""

import dataclasses

import pytest
import torch
from torch import nn

from ddpm.networks.build import build_network
from ddpm.networks.config import MHAUNetConfig
from ddpm.networks.mha_unet import DoubleConv, MHABlock, MHAUpLevel, MultiHeadAttention

SMALL = MHAUNetConfig(channels=8, channel_mult=(1, 2, 4), time_width=12)


def small(image_size=8, **changes):
    net = build_network(dataclasses.replace(SMALL, **changes), image_size, 3, 3, seed=0).eval()
    with torch.no_grad():
        net.conv_out.weight *= 1e5  # awake: the first output is near zero
    return net


def noised(count, image_size=8):
    return torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))


# -------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_equals_torchs_with_the_residual_from_before_the_norm(num_heads):
    ours = MultiHeadAttention(8, num_heads)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    theirs = nn.MultiheadAttention(8, num_heads, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj_out.weight,
            "out_proj.bias": ours.proj_out.bias,
        }
    )
    x = torch.randn(2, 8, 3, 5)
    pixels = x.permute(0, 2, 3, 1).reshape(2, 15, 8)
    normed = ours.norm1(pixels)
    pixels = pixels + theirs(normed, normed, normed)[0]
    pixels = pixels + ours.feed_forward(ours.norm2(pixels))
    expected = pixels.reshape(2, 3, 5, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- faults of published versions


@pytest.mark.parametrize(
    ("image_size", "mult"), [(8, (1, 2, 4)), (12, (1, 3, 2)), (16, (1, 2, 4, 4)), (6, (2, 1))]
)
def test_every_join_is_of_equal_spatial_size(image_size, mult):
    net, joins = small(image_size, channel_mult=mult), []
    for up in (module for module in net.modules() if isinstance(module, MHAUpLevel)):
        up.register_forward_pre_hook(lambda _m, args: joins.append((args[0].shape, args[2].shape)))
    assert net(noised(2, image_size), torch.tensor([1, 2])).shape == (2, 3, image_size, image_size)
    assert len(joins) == len(mult) - 1
    for level, (h, skip) in zip(range(len(mult) - 2, -1, -1), joins, strict=True):
        assert h[:2] == skip[:2] and 2 * h[-1] == skip[-1] == image_size >> level


def test_every_setting_is_read():
    plain = [p.shape for p in small().parameters()]
    for key, value in {"channels": 16, "channel_mult": (1, 2), "time_width": 14}.items():
        assert [p.shape for p in small(**{key: value}).parameters()] != plain, key
    x_t, t = noised(1), torch.tensor([3])
    assert not torch.equal(small()(x_t, t), small(num_heads=2)(x_t, t))


def test_residual_joins_reach_back_before_the_double_convolution():
    block, x, temb = MHABlock(8, 8, 8, SMALL), noised(1).repeat(1, 3, 1, 1)[:, :8], torch.zeros(1, 12)
    with torch.no_grad():
        block.residual.norm2.weight.zero_()  # silences the branch
        seen = []
        block.conv.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        block(x, temb)
    torch.testing.assert_close(seen[0], nn.functional.gelu(x))


def test_group_norm_is_over_all_channels_together():
    norms = [module for module in small().modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 2 * sum(isinstance(module, DoubleConv) for module in small().modules()) > 10
    assert {norm.num_groups for norm in norms} == {1}


# ------------------------------------------------------------------------------------------- shape, refusals


def test_published_widths_at_64():
    config = MHAUNetConfig()
    assert config.find_problems(64) == []
    assert config.widths == (64, 128, 256, 256)
    assert config.up_widths == (256, 128, 64, 64)
    net = build_network(config, 64, 3, 3, seed=0, device="meta")
    assert [conv.conv2.out_channels for conv in net.bottleneck] == [512, 512, 256]
    x_t, t = torch.zeros(2, 3, 64, 64, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert net(x_t, t).shape == (2, 3, 64, 64)
