"""The fast routes against the plain layers, on the same numbers in float32 or float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm.kernels import cpu as kernels

FORMATS = [torch.channels_last, torch.contiguous_format]


def bf16(*shape, seed=0, memory_format=torch.channels_last):
    """Normal numbers that bf16 holds exactly, off centre so that the mean matters."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return x.to(torch.bfloat16).to(memory_format=memory_format).requires_grad_()


def distance(a, b):
    """Relative error of a, over the whole tensor."""
    return float((a.double() - b.double()).detach().norm() / b.double().detach().norm())


def norm_layer(channels, groups):
    norm = nn.GroupNorm(groups, channels, 1e-6)
    with torch.no_grad():
        norm.weight += 0.3 * torch.randn(channels, generator=torch.Generator().manual_seed(1))
        norm.bias += 0.3 * torch.randn(channels, generator=torch.Generator().manual_seed(2))
    return norm


def value_and_gradients(f, norm, x, gradient):
    y = f(x)
    return [y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], gradient.to(y.dtype))]


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("channels", "side"), [(32, 32), (96, 6), (120, 8)])
@pytest.mark.parametrize("cached", [1, 7000, 2**17])  # one image at a time, a few and a rest, all together
def test_group_norm(monkeypatch, swish, memory_format, channels, side, cached):
    monkeypatch.setattr(kernels, "CACHED", cached)
    norm = norm_layer(channels, 8)
    x, gradient = (bf16(5, channels, side, side, seed=s, memory_format=memory_format) for s in (3, 4))

    def plain(x):
        return F.silu(norm(x)) if swish else norm(x)

    found = value_and_gradients(lambda x: kernels.group_norm(norm, x, swish), norm, x, gradient)
    exact = value_and_gradients(plain, norm, x.detach().float().requires_grad_(), gradient)
    assert found[0].dtype == torch.bfloat16 and found[0].stride() == x.stride()
    with torch.no_grad():
        assert distance(kernels.group_norm(norm, x, swish), exact[0]) < 0.003
    # Rounded once, at the end; the sums over images not at all (torch's bf16 kernel: 0.0025 and 0.0016).
    for a, b, limit in zip(found, exact, (0.002, 0.002, 1e-5, 1e-5), strict=True):
        assert distance(a, b) < limit


@pytest.mark.parametrize("length", [16, 2000])
def test_attention(length):
    q, k, v = (bf16(2, length, 24, seed=s, memory_format=torch.contiguous_format) for s in range(3))
    weights = torch.softmax(q.double() @ k.double().transpose(1, 2) / math.sqrt(24), 2)
    exact = weights @ v.double()
    gradients = [torch.autograd.grad(f.sum(), [q, k, v]) for f in (kernels.attend(q, k, v), exact)]
    assert distance(kernels.attend(q, k, v), exact) < 0.01
    assert distance(gradients[0][2], gradients[1][2]) < 0.01
    torch.testing.assert_close(kernels.attend(q.float(), k.float(), v.float()), exact.float())
