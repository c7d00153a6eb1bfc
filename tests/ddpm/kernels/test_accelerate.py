"""An accelerated network against the plain one: same names, same tensors, same outputs and gradients."""

from unittest import mock

import pytest
import torch

from ddpm.kernels import accelerate, winograd
from ddpm.networks.build import build_network
from ddpm.networks.config import ContextUNetConfig, MHAUNetConfig, UNetConfig


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
        assert float((one - other).detach().norm()) < limit * max(
            float(other.detach().norm()), 1e-3 * largest
        )
    layers = [type(module) for module in net.modules()]
    assert [type(module) for module in accelerate(net).modules()] == layers


@pytest.mark.parametrize("config", [ContextUNetConfig(), MHAUNetConfig()], ids=lambda config: config.name)
def test_other_networks_stay_as_they_are(config):
    net = build_network(config, 16, 3, 3, seed=0, device="meta")
    layers = [type(module) for module in net.modules()]
    assert [type(module) for module in accelerate(net).modules()] == layers
