"""The faster layers against the plain ones: the same numbers and gradients, in fewer multiplications."""

import math
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm.kernels import accelerate, cpu, cuda, winograd
from ddpm.networks.build import build_network
from ddpm.networks.config import UNetConfig

FORMATS = [torch.channels_last, torch.contiguous_format]


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bf16(*shape, seed=0, memory_format=torch.channels_last):
    """Normal numbers that bf16 holds exactly, off centre so that the mean matters."""
    x = (numbers(*shape, seed=seed) + 0.5).to(torch.bfloat16)
    return x.to(memory_format=memory_format).requires_grad_()


def distance(a, b):
    return float((a.double() - b.double()).detach().norm() / b.double().detach().norm())


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("channels", "side"), [(32, 32), (96, 6), (120, 8)])
@pytest.mark.parametrize("cached", [1, 7000, 2**17])  # one image at a time, a few and a rest, all together
def test_group_norm(monkeypatch, swish, memory_format, channels, side, cached):
    monkeypatch.setattr(cpu, "CACHED", cached)
    norm, bare = nn.GroupNorm(8, channels, 1e-6), nn.GroupNorm(8, channels, affine=False)
    norm.weight.data += 0.3 * numbers(channels, seed=1)
    norm.bias.data += 0.3 * numbers(channels, seed=2)
    x, gradient = (bf16(5, channels, side, side, seed=s, memory_format=memory_format) for s in (3, 4))
    wide = x.detach().float().requires_grad_()
    y, exact = cpu.group_norm(norm, x, swish), F.silu(norm(wide)) if swish else norm(wide)
    assert y.dtype == torch.bfloat16 and y.stride() == x.stride()
    with torch.no_grad():
        assert distance(cpu.group_norm(norm, x, swish), exact) < 0.003
    found = [y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], gradient)]
    expected = [exact, *torch.autograd.grad(exact, [wide, norm.weight, norm.bias], gradient.float())]
    # Rounded once, at the end; the sums over images not at all (torch's bf16 kernel: 0.0025 and 0.0016).
    for a, b, limit in zip(found, expected, (0.002, 0.002, 1e-5, 1e-5), strict=True):
        assert distance(a, b) < limit
    assert torch.autograd.grad(cpu.group_norm(bare, x, swish).sum(), x)[0].isfinite().all(), "without weights"


@pytest.mark.parametrize("length", [16, 2000])
def test_attention(length):
    q, k, v = (bf16(2, length, 24, seed=s, memory_format=torch.contiguous_format) for s in range(3))
    weights = torch.softmax(q.double() @ k.double().transpose(1, 2) / math.sqrt(24), 2)
    exact = weights @ v.double()
    gradients = [torch.autograd.grad(f.sum(), [q, k, v]) for f in (cpu.attend(q, k, v), exact)]
    assert distance(cpu.attend(q, k, v), exact) < 0.01
    assert distance(gradients[0][2], gradients[1][2]) < 0.01
    torch.testing.assert_close(cpu.attend(q.float(), k.float(), v.float()), exact.float())


# Relative errors of the whole tensor; of the plain layer: 6e-7 in float32, 3e-3 in bf16.
F4, F2 = winograd.F4, winograd.F2
ERRORS = [(F4, torch.float32, 5e-6), (F2, torch.float32, 1e-6), (F2, torch.bfloat16, 1e-2)]


@pytest.mark.parametrize("chunk", [1, 200, 4096])  # an image at a time, some and a rest, all together
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("basis", "dtype", "limit"), ERRORS)
def test_value_and_gradients(monkeypatch, basis, dtype, limit, memory_format, chunk):
    monkeypatch.setattr(winograd, "CHUNK", chunk)
    x = numbers(5, 24, 8, 12).to(dtype).to(memory_format=memory_format).requires_grad_()
    w = (numbers(40, 24, 3, 3, seed=1) / 15).to(memory_format=memory_format).requires_grad_()
    b, d_y = numbers(40, seed=2).requires_grad_(), numbers(5, 40, 8, 12, seed=3).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, w, b)]
    y, y_exact = winograd.conv3x3(x, w, b, basis), F.conv2d(*exact, padding=1)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert distance(y, y_exact) < limit
    found = torch.autograd.grad(y, (x, w, b), d_y)
    expected = torch.autograd.grad(y_exact, exact, d_y.double())
    assert [tensor.dtype for tensor in found] == [dtype, torch.float32, torch.float32]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and distance(one, other) < limit


def test_the_layer_takes_the_short_way_where_it_pays_and_only_there():
    def goes_short(channels=128, side=16, count=4, dtype=torch.float32, out_channels=128):
        layer, x = nn.Conv2d(channels, out_channels, 3, padding=1), numbers(count, channels, side, side)
        with mock.patch.object(winograd, "conv3x3", wraps=winograd.conv3x3) as short, torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = cpu.convolve(layer, x.to(dtype))
            assert distance(y, layer(x).double()) < (1e-2 if dtype == torch.bfloat16 else 5e-6)
        return short.called

    assert goes_short() and goes_short(side=8, count=16)
    elsewhere = ({"channels": 64}, {"out_channels": 64}, {"side": 4}, {"side": 18}, {"count": 1})
    assert not any(goes_short(**settings) for settings in elsewhere)
    with mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False):
        assert goes_short(dtype=torch.bfloat16)
        assert not goes_short(dtype=torch.bfloat16, side=8, count=16)
    with mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=True):
        assert not goes_short(dtype=torch.bfloat16)


def small_unet(channels):
    """128 channels are enough for the short way; bf16, which many CPUs compute slowly, goes without it."""
    config = UNetConfig(channels=channels, channel_mult=(1, 2), num_res_blocks=1, dropout=0.0, norm_groups=8)
    net = build_network(config, 32, 3, 3, seed=0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * numbers(*p.shape, seed=p.numel())
    return net


def differentiate(net, x, precision, call=None):
    """The output of a network, or of another call of it, and the gradients of its weights."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        y = (call or net)(x, torch.tensor([10, 999]))
    return [y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))]


def assert_near(found, expected, limit, least):
    """Relative errors; small gradients (the keys' biases have none but rounding) by a share of the largest."""
    largest = max(tensor.detach().norm() for tensor in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).detach().norm() < limit * max(other.detach().norm(), least * largest)


@pytest.mark.parametrize(("precision", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_outputs_and_gradients_are_the_plain_networks(precision, limit):
    net, x = small_unet(128 if precision == torch.float32 else 32), numbers(2, 3, 32, 32, seed=1)
    names, tensors = list(net.state_dict()), [p.data_ptr() for p in net.parameters()]
    expected = differentiate(net, x, precision)
    with mock.patch.object(winograd, "conv3x3", wraps=winograd.conv3x3) as short:
        assert_near(differentiate(accelerate(net), x, precision), expected, limit, least=1e-3)
    assert precision != torch.float32 or short.call_count > 5
    assert list(net.state_dict()) == names and [p.data_ptr() for p in net.parameters()] == tensors
    layers = [type(module) for module in net.modules()]
    assert [type(module) for module in accelerate(net).modules()] == layers


def test_the_layers_of_a_gpu_compute_the_same_network(monkeypatch):
    """Run on the CPU: norms in bf16, one product for q, k and v, joined casts of all weights, casts that are kept."""
    net, x = accelerate(small_unet(32)), torch.randn(2, 3, 32, 32)
    expected = differentiate(net, x, torch.bfloat16)
    monkeypatch.setattr(cuda, "is_on_cuda", lambda x: True)
    monkeypatch.setattr(cpu, "_is_bf16_on_cpu", lambda x: False)
    found = differentiate(net, x, torch.bfloat16, partial(cuda.call_with_cast_weights, net))
    assert {y.dtype for y in found} == {torch.float32}
    assert_near(found, expected, 5e-2, least=1e-2)
    cuda.keep_cast_weights(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, torch.tensor([10, 999])), found[0])


@pytest.mark.parametrize("channels", [8, 128])
@pytest.mark.parametrize("settings", [
    {"stride": 2, "padding": 1}, {"padding": 0}, {"padding": 2}, {"padding": "same"}, {"dilation": 2, "padding": 2},
    {"groups": 2, "padding": 1}, {"padding": 1, "padding_mode": "reflect"}, {"kernel_size": 1},
    {"kernel_size": 5, "padding": 2}, {"kernel_size": (3, 1), "padding": (1, 0)}, {"padding": 1, "bias": False},
    {"padding": 1},
], ids=str)  # fmt: skip
def test_a_convolution_of_another_kind_is_computed_as_it_is(settings, channels):
    layer = nn.Conv2d(channels, channels, **{"kernel_size": 3, **settings})
    x = numbers(8, channels, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(cpu.convolve(layer, x), layer(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(cpu.convolve(layer, x[0]), layer(x[0]), rtol=1e-3, atol=1e-4)
