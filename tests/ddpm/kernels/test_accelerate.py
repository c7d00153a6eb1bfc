"""An accelerated network against the plain one: same names, same tensors, same outputs and gradients."""

from functools import partial
from unittest import mock

import pytest
import torch

from ddpm.kernels import accelerate, cpu, cuda, winograd
from ddpm.networks.build import build_network
from ddpm.networks.config import ContextUNetConfig, MHAUNetConfig, UNetConfig
from ddpm.networks.layers import NORMS


def wide_unet():
    """A U-Net with weights that no layer starts at zero."""
    config = UNetConfig(channels=128, channel_mult=(1, 2), num_res_blocks=1, dropout=0.0)
    net = build_network(config, 32, 3, 3, seed=0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return net


# Relative errors of outputs and gradients; small gradients (the keys' biases have none but rounding) by the largest.
@pytest.mark.parametrize(("precision", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_outputs_and_gradients_are_the_plain_networks(precision, limit):
    net, x = wide_unet(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    names, tensors = list(net.state_dict()), [p.data_ptr() for p in net.parameters()]

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            y = net(x, torch.tensor([10, 999]))
        return [y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))]

    expected = run()
    with mock.patch.object(winograd, "conv3x3", wraps=winograd.conv3x3) as short:
        found = accelerate(net) and run()
    assert precision != torch.float32 or short.call_count > 5
    assert list(net.state_dict()) == names and [p.data_ptr() for p in net.parameters()] == tensors
    largest = max(float(tensor.detach().norm()) for tensor in expected)
    for one, other in zip(found, expected, strict=True):
        least = max(float(other.detach().norm()), 1e-3 * largest)
        assert float((one - other).detach().norm()) < limit * least
    layers = [type(module) for module in net.modules()]
    assert [type(module) for module in accelerate(net).modules()] == layers


@pytest.mark.parametrize("config", [ContextUNetConfig(), MHAUNetConfig()], ids=lambda config: config.name)
def test_of_other_networks_only_the_norms_are_replaced(config):
    net = build_network(config, 16, 3, 3, seed=0, device="meta")
    layers = [type(module) for module in net.modules()]
    for layer, module in zip(layers, accelerate(net).modules(), strict=True):
        assert type(module) is layer or (layer in NORMS and isinstance(module, layer))


def test_the_layers_of_a_gpu_compute_the_same_network(monkeypatch):
    """Run on the CPU: norms in bf16, one product for q, k and v, joined casts of all weights, casts that are kept."""
    net, x, t = accelerate(wide_unet()), torch.randn(2, 3, 32, 32), torch.tensor([10, 999])
    parameters = list(net.parameters())

    def run(call):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x, t)
        return [y, *torch.autograd.grad(y.square().sum(), parameters)]

    expected = run(net)
    monkeypatch.setattr(cuda, "is_on_cuda", lambda x: True)
    monkeypatch.setattr(cpu, "_is_bf16_on_cpu", lambda x: False)
    found = run(partial(cuda.call_with_cast_weights, net))
    assert {y.dtype for y in found} == {torch.float32}
    largest = max(float(tensor.detach().norm()) for tensor in expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).detach().norm()) < 5e-2 * max(float(other.detach().norm()), 1e-2 * largest)
    cuda.keep_cast_weights(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, t), found[0])
