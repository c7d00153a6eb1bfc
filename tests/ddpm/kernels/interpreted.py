"""The Triton kernels against float64, for a process with TRITON_INTERPRET=1: `test_fused.py` runs this file in one."""

import pytest
import torch
import torch.nn.functional as F

from ddpm.kernels import accelerate, fused
from ddpm.networks.build import build_network
from ddpm.networks.config import UNetConfig
from ddpm.networks.layers import RowDropout, draw_kept, set_dropout_keys, view_as_images

DROPPED, GROUPS = 6554, 8  # of 2**16; of channels
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def activate_plainly(x, temb, weight, bias, keys, swish):
    h = x if temb is None else x + temb[:, :, None, None]
    y = F.group_norm(h, GROUPS, weight, bias, 1e-6)
    y = F.silu(y) if swish else y
    if keys is None:
        return y
    kept = draw_kept(keys[:, :, None], x[0].numel(), DROPPED)
    return y * view_as_images(kept.to(x.dtype), x) * 2**16 / (2**16 - DROPPED)


@pytest.mark.parametrize("dtype, channels, side, has_all", [
    (torch.float32, 32, 6, True), (torch.bfloat16, 32, 6, True), (torch.float32, 24, 13, False),
    (torch.bfloat16, 96, 3, True), (torch.float32, 520, 5, True),
])  # fmt: skip
def test_the_norm_equals_float64(dtype, channels, side, has_all):
    """Groups of 4, 3, 12 and 65 channels: what does not fill a tile is left out. The images' mean is far from zero.

    With all there are an embedding, dropout and swish; without, none of them.
    """
    draws, limit = torch.Generator().manual_seed(0), 1e-6 if dtype == torch.float32 else 5e-3
    x, temb = (torch.randn(2, channels, *of, generator=draws).to(dtype) for of in ((side, side), ()))
    x = (x + 20).to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(channels, generator=draws) for _ in range(2))
    keys = None
    if has_all:  # of an image in neighbouring places, as a training step has them
        keys = torch.randint(-(2**31), 2**31, (2, 4), dtype=torch.int32, generator=draws)[:, 1:3].T
    inputs, how = [x, *([temb] if has_all else []), weight, bias], (keys, GROUPS, 1e-6, DROPPED, has_all)
    ours = [value.clone().requires_grad_() for value in inputs]
    theirs = [value.double().detach().requires_grad_() for value in inputs]
    if not has_all:
        ours.insert(1, None), theirs.insert(1, None)
        torch.library.opcheck(fused.activate_norm, (*ours, *how), test_utils=CHECKS)
    found = fused.activate_norm(*ours, *how)[0]
    expected = activate_plainly(*theirs, keys, has_all)
    gradient = torch.randn(found.shape, generator=draws).to(dtype)
    found.backward(gradient)
    expected.backward(gradient.double())
    assert torch.equal(found == 0, expected == 0) and found.dtype == dtype
    both = [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True) if a is not None]
    for value, exact in [(found, expected), *both]:
        assert (value.double() - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_a_branch_equals_float64(dtype):
    """More pixels than a stripe, numbers than a block, channels than a tile; the gradient is a part of a joined one."""
    draws, limit = torch.Generator().manual_seed(0), 1e-6 if dtype == torch.float32 else 5e-3
    x, h = torch.randn(2, 3, 40, 15, 14, generator=draws).to(dtype)
    inputs = x, h.to(memory_format=torch.channels_last), torch.randn(40, generator=draws)
    ours = [value.clone().requires_grad_() for value in inputs]
    theirs = [value.detach().double().requires_grad_() for value in ours]
    found, expected = fused.add_branch(*ours), theirs[0] + theirs[1] + theirs[2][:, None, None]
    gradient = torch.randn(3, 50, 15, 14, generator=draws).to(dtype)
    for output in (found, expected):
        (torch.cat([output, output[:, :10]], dim=1) * gradient).sum().backward()
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    for value, exact in [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]:
        assert (value.double() - exact).norm() < limit * exact.norm()
    torch.library.opcheck(fused.add_branch, tuple(ours), test_utils=CHECKS)


def test_a_fused_network_learns_as_the_plain_one(monkeypatch):
    monkeypatch.setattr(fused, "can_fuse", lambda x: True)
    config = UNetConfig(
        channels=16, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.1, norm_groups=8,
        fused=True,
    )  # fmt: skip
    nets, found = [build_network(config, 4, 3, 3, seed=0) for _ in range(2)], []
    with torch.no_grad():
        for p, same in zip(*(net.parameters() for net in nets), strict=True):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            same.copy_(p)
    for net in (nets[0], accelerate(nets[1])):
        dropouts = [layer for layer in net.modules() if isinstance(layer, RowDropout)]
        keys = torch.arange(4 * len(dropouts), dtype=torch.int32).reshape(len(dropouts), 2, 2, 1) * 10**6
        x = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
        with set_dropout_keys(dropouts, keys):
            output = net.train()(x, torch.tensor([3, 700]))
        (output * x).sum().backward()
        found.append([output, *(p.grad for p in net.parameters())])
    used = {type(module).__name__ for module in nets[1].modules()}
    assert used >= {"FusedUNet", "FusedResBlock", "FusedAttention"}
    for value, expected in zip(found[1], found[0], strict=True):
        assert (value - expected).norm() < 1e-5 * expected.norm() + 1e-5
