"""Convolutions in fewer multiplications against the plain ones in float64."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm.kernels import cpu as kernels
from ddpm.kernels import winograd

# Relative errors of the whole tensor; of the plain layer: 6e-7 in float32, 3e-3 in bf16.
F4, F2 = winograd.F4, winograd.F2
ERRORS = [(F4, torch.float32, 5e-6), (F2, torch.float32, 1e-6), (F2, torch.bfloat16, 1e-2)]


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(a, b):
    return float((a.double() - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("chunk", [1, 200, 4096])  # an image at a time, some and a rest, all together
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("basis", "dtype", "limit"), ERRORS)
def test_value_and_gradients(monkeypatch, basis, dtype, limit, memory_format, chunk):
    monkeypatch.setattr(winograd, "CHUNK", chunk)
    x = numbers(5, 24, 8, 12).to(dtype).to(memory_format=memory_format).requires_grad_()
    w = (numbers(40, 24, 3, 3, seed=1) / 15).to(memory_format=memory_format).requires_grad_()
    b, d_y = numbers(40, seed=2).requires_grad_(), numbers(5, 40, 8, 12, seed=3).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, w, b)]
    y, y_exact = winograd.conv3x3(x, w, b, basis), F.conv2d(*exact, padding=1)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, y_exact) < limit
    found = torch.autograd.grad(y, (x, w, b), d_y)
    expected = torch.autograd.grad(y_exact, exact, d_y.double())
    assert [tensor.dtype for tensor in found] == [dtype, torch.float32, torch.float32]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and error(one, other) < limit


def test_a_basis_for_types_and_sides_that_bear_it():
    def basis(dtype, height, width):
        return winograd.choose_basis(torch.empty(1, 1, height, width, dtype=dtype))

    assert basis(torch.float32, 8, 12) is winograd.F4 and basis(torch.bfloat16, 6, 2) is winograd.F2
    assert basis(torch.float32, 8, 6) is None and basis(torch.bfloat16, 3, 2) is None
    assert basis(torch.float64, 8, 8) is None


def test_the_layer_takes_the_short_way_where_it_pays_and_only_there():
    def goes_short(channels=128, side=16, count=4, dtype=torch.float32, out_channels=128):
        layer, x = nn.Conv2d(channels, out_channels, 3, padding=1), numbers(count, channels, side, side)
        with mock.patch.object(winograd, "conv3x3", wraps=winograd.conv3x3) as short, torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = kernels.convolve(layer, x.to(dtype))
            assert error(y, layer(x).double()) < (1e-2 if dtype == torch.bfloat16 else 5e-6)
        return short.called

    assert goes_short() and goes_short(side=8, count=16)
    elsewhere = ({"channels": 64}, {"out_channels": 64}, {"side": 4}, {"count": 1})
    assert not any(goes_short(**settings) for settings in elsewhere)
    with mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False):
        assert goes_short(dtype=torch.bfloat16)
        assert not goes_short(dtype=torch.bfloat16, side=8, count=16)
    with mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=True):
        assert not goes_short(dtype=torch.bfloat16)
