"""What a GPU must compute as the CPU does. The first thing that any GPU sees; skipped where there is none.

On a machine with torch and pytest alone: python -m pytest tests/gpu --noconftest. DDPM_REHEARSE=1 tries them on a CPU.
"""

import copy
import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F

from ddpm import rng
from ddpm.config import TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.graphs import RecordedGradients, RecordedNetwork
from ddpm.kernels import accelerate, cpu, cuda
from ddpm.networks import NETWORKS
from ddpm.networks.build import build_network
from ddpm.networks.config import UNetConfig
from ddpm.networks.layers import draw_kept, view_as_images
from ddpm.precision import PreciseNetwork, use_deterministic
from ddpm.training import TrainState, train_step

REHEARSE = "DDPM_REHEARSE" in os.environ
DEVICE = torch.device("cpu" if REHEARSE else "cuda")
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REHEARSE and not torch.cuda.is_available(), reason="there is no GPU"),
]

ROWS, SIDE = torch.arange(16), 16
SMALL = UNetConfig(
    channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), dropout=0.1
)
TRAIN = TrainConfig(batch_size=16, warmup_steps=0)
# ‖difference‖ / ‖reference‖ of a network's output, against float64.
LIMITS = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 3e-2}


def build(device, config=SMALL):
    net = build_network(config, SIDE, 3, 3, seed=0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return accelerate(net).to(device).to(memory_format=torch.channels_last)


def differ(found, reference) -> float:
    found, reference = found.detach().double().cpu(), reference.detach().double().cpu()
    return float((found - reference).norm() / reference.norm())


def make_step(device, config=TRAIN, net=SMALL, compute=None):
    state = TrainState(config, build(device, net), Diffusion().config)
    pixels = torch.randint(0, 256, (16, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    pixels = pixels.byte().to(device)
    diffusion = Diffusion().to(device)
    return state, lambda: train_step(state, diffusion, pixels, ROWS, config=config, seed=3, compute=compute)


def test_words_are_the_cpus_and_normals_up_to_their_last_bits():
    for draw in (rng.draw_words, rng.draw_normal):
        last = 1000 if draw is rng.draw_words else (1000,)
        found, expected = (draw(7, rng.Stream.NOISE, 5, ROWS.to(d), last) for d in (DEVICE, CPU))
        if draw is rng.draw_words:
            assert torch.equal(found.cpu(), expected)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
    orders = [rng.draw_permutation(7, rng.Stream.ORDER, 1, 5000, device) for device in (DEVICE, CPU)]
    assert torch.equal(orders[0].cpu(), orders[1])


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"exact"}))
def test_a_network_equals_itself_in_float64_within_its_precision(name, precision):
    config = SMALL if name == "unet" else NETWORKS[name]()
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([10, 999])
    net = build(DEVICE, config).eval().requires_grad_(False)
    reference = copy.deepcopy(net).to(CPU).double()(x.double(), t)
    if precision == "bf16" and DEVICE.type == "cuda":
        cuda.keep_cast_weights(net)
    assert differ(PreciseNetwork(net, precision)(x.to(DEVICE), t.to(DEVICE)), reference) < LIMITS[precision]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", LIMITS)
def test_gradients_of_a_step_are_the_cpus(precision, fused):
    """The masks of dropout too."""
    (ours, step), (theirs, reference) = (
        make_step(device, dataclasses.replace(TRAIN, precision=p), dataclasses.replace(SMALL, fused=f))
        for device, p, f in ((DEVICE, precision, fused), (CPU, "fp32", False))
    )
    found, expected = step(), reference()
    assert differ(found["loss"], expected["loss"]) < LIMITS[precision]
    assert differ(found["grad_norm"], expected["grad_norm"]) < 3 * LIMITS[precision]
    for ours_p, theirs_p in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
        if theirs_p.grad.norm() > 1e-2 * expected["grad_norm"]:
            assert differ(ours_p.grad, theirs_p.grad) < 5 * LIMITS[precision]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_attention_equal_float64(dtype):
    x = torch.randn(4, 64, 8, 8, device=DEVICE).to(dtype).to(memory_format=torch.channels_last)
    norm = cuda.FastGroupNorm(32, 64, 1e-6).to(DEVICE)
    expected = F.group_norm(x.double(), 32, eps=1e-6)
    assert differ(cpu.group_norm(norm, x, swish=False), expected) < (1e-5 if dtype == torch.float32 else 1e-2)
    for channels in (64, 256, 512):
        q, k, v = torch.randn(3, 4, 256, channels, device=DEVICE).to(dtype)
        expected = F.scaled_dot_product_attention(*(y.double().cpu()[:, None] for y in (q, k, v)))[:, 0]
        assert differ(cpu.attend(q, k, v), expected) < (1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(
    REHEARSE, reason="the kernels run on a GPU, and in tests/ddpm/kernels by Triton's interpreter"
)
def test_fused_kernels_equal_float64(dtype):
    from ddpm.kernels.fused import activate_norm

    norm, temb = torch.nn.GroupNorm(32, 384, 1e-6), torch.randn(4, 384)
    x, keys = torch.randn(4, 384, 32, 32) + 5, torch.randint(-(2**31), 2**31, (2, 4, 1), dtype=torch.int32)
    x = x.to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    placed = x.detach().to(DEVICE).requires_grad_(), temb.to(DEVICE, dtype)
    scale = norm.weight.to(DEVICE), norm.bias.to(DEVICE)
    found = activate_norm(*placed, *scale, keys[:, :, 0].to(DEVICE), 32, 1e-6, 6554, True)[0]
    exact = F.silu(norm.double()(x.double() + temb.to(dtype).double()[:, :, None, None]))
    exact = exact * view_as_images(draw_kept(keys, x[0].numel(), 6554), x) * 2**16 / (2**16 - 6554)
    for output in (found, exact):
        (output * torch.linspace(-1, 1, 32, device=output.device)).sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert differ(found, exact) < limit and differ(placed[0].grad, x.grad) < limit
    assert torch.equal(found.cpu() == 0, exact == 0)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CPU records nothing")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["unet", "fused", "context_unet", "mha_unet"])
def test_a_recorded_training_equals_a_plain_one(name, parts):
    """Bit by bit where the algorithms have one order; over the tried calls, the recording and its repetitions."""
    is_exact = name in ("unet", "fused")
    net = dataclasses.replace(SMALL, fused=name == "fused") if is_exact else NETWORKS[name]()
    config, found = dataclasses.replace(TRAIN, precision="bf16", accumulate=parts), []
    with use_deterministic(is_exact):
        for compute in (None, RecordedGradients()):
            state, step = make_step(DEVICE, config, net, compute)
            results = [step() for _ in range(6)]
            found.append([torch.stack([r["loss"] for r in results]), *state.state_dict().values()])
    for value, expected in zip(found[1], found[0], strict=True):
        if is_exact:
            assert torch.equal(value, expected)
        else:
            torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CPU records nothing")
def test_a_recorded_network_equals_itself():
    net = build(DEVICE, dataclasses.replace(SMALL, fused=True)).eval().requires_grad_(False)
    precise = PreciseNetwork(net, "bf16")
    recorded, draws = RecordedNetwork(precise), torch.Generator().manual_seed(4)
    for call in range(12):
        x = torch.randn(2 + call % 2, 3, SIDE, SIDE, generator=draws).to(DEVICE)
        t = torch.randint(0, 1000, (len(x),), generator=draws).to(DEVICE)
        assert torch.equal(recorded(x, t), precise(x, t))


@pytest.mark.parametrize("precision", LIMITS)
def test_five_steps_never_wait_for_the_device(precision):
    _, step = make_step(DEVICE, dataclasses.replace(TRAIN, precision=precision))
    step()
    set_mode = torch.cuda.set_sync_debug_mode if DEVICE.type == "cuda" else lambda mode: None
    set_mode("error")
    try:
        for _ in range(5):
            step()
    finally:
        set_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_untouched_one_bit_for_bit(precision):
    config = dataclasses.replace(TRAIN, precision=precision)
    with use_deterministic(True):
        untouched, step = make_step(DEVICE, config)
        step()
        kept = {name: tensor.clone() for name, tensor in untouched.state_dict().items()}
        step()
        resumed, again = make_step(DEVICE, config)
        resumed.load_state_dict(kept)
        again()
    ours, theirs = resumed.state_dict(), untouched.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CPU does not say what is allocated")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measured_memory_is_within_a_fifth_of_the_predicted(precision):
    load = pytest.importorskip("pipeline.config").load_experiment
    from pipeline.compute.memory import estimate_step_memory

    experiment = load("cifar10", [f"train.precision={precision}"])
    state = TrainState(experiment.train, build(DEVICE, UNetConfig()), experiment.diffusion)
    pixels = torch.zeros(128, 3, 32, 32, dtype=torch.uint8, device=DEVICE)
    for _ in range(2):  # in the first one cuDNN tries its algorithms, with a workspace for each
        torch.cuda.reset_peak_memory_stats()
        train_step(state, Diffusion().to(DEVICE), pixels, torch.arange(128), config=experiment.train, seed=0)
    found = torch.cuda.max_memory_allocated()
    assert found == pytest.approx(estimate_step_memory(experiment, 128, 1), rel=0.2)
