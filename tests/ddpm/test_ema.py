"""EMA against the recurrence written out in float64."""

import pytest
import torch
from torch import nn

from ddpm.ema import EMA


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9999, False), (0.8, True)])
def test_the_recurrence_after_a_first_copy(decay, warmup):
    net, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    ema, expected = EMA(net, decay, warmup), net.weight.detach().double()
    for n in range(60):  # (1 + n) / (10 + n) passes 0.8 at n = 35
        net.weight.data += torch.randn(2, 3, generator=generator)
        weight = net.weight.detach().double()
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        expected = weight if n == 0 else d * expected + (1 - d) * weight
        ema.update(net, n)
        torch.testing.assert_close(ema.state_dict()["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    if warmup:
        assert [ema.compute_decay(n) for n in (1, 35, 1000)] == [2 / 11, 0.8, 0.8]


def test_buffers_are_copied_the_layout_is_the_networks_and_averages_are_float32():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    net.register_buffer("scratch", torch.ones(3), persistent=False)
    ema = EMA(net, 0.9)
    net(torch.randn(4, 1, 2, 2))
    ema.update(net, 5)
    assert ema.state_dict()["1.num_batches_tracked"].item() == 1
    assert torch.equal(ema.state_dict()["1.running_mean"], net[1].running_mean)
    assert ema.state_dict().keys() == net.state_dict().keys()
    net.load_state_dict(ema.state_dict())
    net = nn.Linear(3, 2).to(torch.bfloat16)
    ema = EMA(net, 0.5)
    ema.update(net, 1)
    assert {tensor.dtype for tensor in ema.state_dict().values()} == {torch.float32}
