"""The networks of the source documents: counts, golden outputs, each document read again, and context."""

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ddpm.config import DiffusionConfig, TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.networks import NO_LABEL
from ddpm.networks.build import build_network
from ddpm.networks.config import AnnotatedUNetConfig, ApiUNetConfig, ContextUNetConfig, MHAUNetConfig
from ddpm.networks.layers import NORMS
from ddpm.sampler import add_guidance, sample
from ddpm.training import TrainState, train_step


class Layers:
    """Layers that take the next weight and bias of a list, in the order in which they are called."""

    def __init__(self, weights):
        self.weights = iter(weights)

    def apply(self, function, *args, **kwargs):
        return function(*args, next(self.weights), next(self.weights), **kwargs)

    def conv(self, x, size=3, stride=1):
        return self.apply(F.conv2d, x, stride=stride, padding=size // 2)

    def up(self, x, stride, padding=0):
        return self.apply(F.conv_transpose2d, x, stride=stride, padding=padding)

    def linear(self, x):
        return self.apply(F.linear, x)

    def norm(self, x, groups=32):
        return self.apply(F.group_norm, x, groups)

    def embed(self, x):
        return self.linear(F.gelu(self.linear(x)))[..., None, None]

    def attend(self, x, heads=1):
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in self.linear(x).chunk(3, dim=2))
        shares = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.linear((shares @ v).transpose(1, 2).flatten(2))


def encode(t, width, last):
    angle = t[:, None] * 10000 ** (-torch.arange(width // 2).to(t) / last)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def read_000_or_004(net, x, t, context, *, width, attention, is_api, adds_to_normed):
    layers = Layers(net)
    time = F.silu(layers.linear(F.silu(layers.linear(encode(t, width, width // 2 - 1)))))

    def run_block(x, attends):
        h = layers.conv(F.silu(layers.norm(x))) + layers.linear(time)[..., None, None]
        h = layers.conv(F.silu(layers.norm(h)))
        x = h + (x if x.shape == h.shape else layers.conv(x, 1))
        if not attends:
            return x
        normed = layers.norm(x)
        return (normed if adds_to_normed else x) + layers.attend(normed.flatten(2).mT).mT.reshape(x.shape)

    skips = [x := layers.conv(x)]
    for depth in (1, 2, 3, 4):
        if depth > 1:
            skips.append(x := layers.conv(x, stride=2))
        for _ in range(2):
            skips.append(x := run_block(x, depth in attention))
    x = run_block(run_block(x, True), False)
    for depth in (4, 3, 2, 1):
        for _ in range(3):
            x = run_block(torch.cat([x, skips.pop()], dim=1), depth in attention)
        if depth > 1:
            x = layers.conv(F.interpolate(x, scale_factor=2)) if is_api else layers.up(x, 2, 1)
    return layers.conv(F.silu(layers.norm(x)) if is_api else x)


def read_001(net, x, t, context, *, levels, timesteps):
    layers, time = Layers(net), (t[:, None] + 1) / timesteps

    def convolve(x, times):
        for _ in range(times):
            x = layers.conv(x)
            width = x.shape[1]
            x = F.gelu(layers.apply(F.batch_norm, x, torch.zeros(width).to(x), torch.ones(width).to(x)))
        return x

    h = convolve(x, 2)
    h = first = (layers.conv(x, 1) + h) / 1.414
    skips = [h := F.max_pool2d(convolve(h, 4), 2) for _ in range(levels)]
    side = h.shape[-1]
    h = F.relu(layers.norm(layers.up(F.gelu(F.avg_pool2d(h, side)), side), 8))
    for i in range(levels):
        if i < 2:
            h = layers.embed(context) * h
            h = h + layers.embed(time)
        h = convolve(layers.up(torch.cat([h, skips.pop()], dim=1), 2), 4)
    return layers.conv(F.relu(layers.norm(layers.conv(torch.cat([h, first], dim=1)), 8)))


def read_002(net, x, t, context):
    layers, code = Layers(net), encode(t, 128, 64)

    def convolve(x, times=2):
        for _ in range(times):
            x = F.relu(layers.norm(layers.conv(x), 1))
        return x

    def run_block(x, activate):
        x = convolve(x) + layers.linear(activate(code))[..., None, None]
        pixels, normalise = x.flatten(2).mT, partial(layers.apply, F.layer_norm)
        pixels = pixels + layers.attend(normalise(pixels, x.shape[1:2]), heads=4)
        pixels = pixels + layers.linear(F.gelu(layers.linear(normalise(pixels, x.shape[1:2]))))
        return pixels.mT.reshape(x.shape)

    skips = [x := convolve(x)]
    for _ in range(3):
        skips.append(x := run_block(F.max_pool2d(x, 2), F.relu))
    x = convolve(skips.pop(), 6)
    for _ in range(3):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = run_block(torch.cat([skips.pop(), x], dim=1), F.silu)
    return layers.conv(x, 1)


INPUT = AnnotatedUNetConfig(attention_residual="input")
read_000 = partial(read_000_or_004, width=64, attention=(3, 4), is_api=False)
read_004 = partial(read_000_or_004, width=128, attention=(2,), is_api=True, adds_to_normed=False)
NARROW = {"channels_per_depth": (32, 64, 32, 96)}
# Settings, a narrow form of them, T, labels, and the document's reading.
DOCUMENTS = {
    "000": (AnnotatedUNetConfig(), NARROW, 1000, None, partial(read_000, adds_to_normed=True)),
    "000-input": (INPUT, NARROW, 1000, None, partial(read_000, adds_to_normed=False)),
    "001": (ContextUNetConfig(), {"channels": 8}, 500, [0, 3], partial(read_001, levels=2, timesteps=500)),
    "002": (MHAUNetConfig(), {"channels": 8}, 1000, None, read_002),
    "004": (ApiUNetConfig(), NARROW, 1000, None, read_004),
}
# Side, t, used parameters and tensors; out[0, 0, 0, 0:4], the last element and the mean, from another reading of the
# documents, by whoever described them.
GOLDEN = {
    "000": (32, [0, 60], 168_898_883, 336, [0.076838, 0.077694, 0.081169, 0.096148, -0.082420, 0.035947]),
    "001": (16, [0, 499], 1_481_027, 104, [-0.805676, -2.176442, -2.601261, -2.548508, -0.628936, -0.052519]),
    "004": (32, [1, 60], 32_416_643, 304, [-0.016728, -0.091619, -0.118392, -0.256345, 0.630283, 0.072588]),
}  # fmt: skip


# Parameters of each part as the documents' descriptions count them; where one opens a level with the downsampling, ours
# ends the level above with it.
PARTS = {
    "000": {
        "time_mlp": 82_432, "conv_in": 1_792, "down.0": 181_120 + 36_928, "down.1": 628_544 - 36_928 + 147_584,
        "down.2": 2_906_752 - 147_584 + 590_080, "down.3": 40_462_080 - 590_080, "middle": 42_487_808,
        "up.0": 75_011_840, "up.1": 5_466_496, "up.2": 1_260_864, "up.3": 407_424, "conv_out": 1_731,
    },
    "001": {
        "conv_in": 39_232, "down.0": 148_224, "down.1": 517_632, "middle": 262_528, "up.0": 34_048 + 213_824,
        "up.1": 8_832 + 181_056, "head": 75_651 - 1_731, "conv_out": 1_731,
    },
    "002": {
        "conv_in": 38_976, "down.0": 238_464 + 99_584, "down.1": 919_296 + 395_776, "down.2": 1_214_208 + 395_776,
        "bottleneck": 3_542_016 + 4_721_664 + 1_771_008, "up.0": 754_560 + 99_584, "up.1": 192_960 + 25_216,
        "up.2": 119_232 + 25_216, "conv_out": 195,
    },
}  # fmt: skip


@pytest.mark.parametrize("document", PARTS)
def test_every_part_has_the_parameters_of_the_document(document):
    config, _, timesteps, labels, _ = DOCUMENTS[document]
    size = {"000": 32, "001": 16, "002": 64}[document]
    net = build_network(config, size, 3, 3, 0, 5 if labels else 0, "meta", timesteps)
    parts = PARTS[document]
    assert {part: sum(p.numel() for p in net.get_submodule(part).parameters()) for part in parts} == parts
    assert sum(parts.values()) == sum(p.numel() for p in net.parameters())


def fill_in_order_of_use(net, *inputs):
    """Fill each tensor with a sine of its place: 1 + 0.1 s for norms, 0.1 s for biases, s / sqrt(fan in) else."""
    found = {}
    for module in net.modules():
        if not list(module.children()):
            named = module.named_parameters()
            names = {p: isinstance(module, NORMS) and name == "weight" for name, p in named}
            module.register_forward_pre_hook(lambda _module, _inputs, names=names: found.update(names))
    net(*inputs)
    for k, (p, is_scale) in enumerate(found.items()):
        s = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + k)
        p.data = (0.1 * s + is_scale if p.ndim == 1 else s / math.sqrt(p[0].numel())).reshape(p.shape).to(p)
    return list(found)


@torch.no_grad()
def compute_outputs(config, size, timesteps, t, labels, dtype):
    net = build_network(config, size, 3, 3, 0, 5 if labels else 0, "meta", timesteps)
    net = net.to_empty(device="cpu").to(dtype).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_parameters()
    x = torch.sin(0.3 * torch.arange(2 * 3 * size**2, dtype=torch.float64)).reshape(2, 3, size, size)
    inputs = (x.to(dtype), torch.tensor(t), torch.tensor(labels) if labels else None)
    return fill_in_order_of_use(net, *inputs), inputs, net(*inputs)


@pytest.mark.parametrize("document", DOCUMENTS)
@torch.no_grad()
def test_a_narrow_form_equals_the_reading_of_the_document(document):
    config, narrow, timesteps, labels, read = DOCUMENTS[document]
    config = dataclasses.replace(config, **narrow)
    weights, (x, t, context), ours = compute_outputs(config, 16, timesteps, [3, 477], labels, torch.float64)
    context = None if labels is None else F.one_hot(context, 5).double()
    theirs = read(weights, x, t.double(), context)
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("document", [pytest.param("000", marks=pytest.mark.slow), "001", "004"])
def test_golden_outputs(document):
    size, t, parameters, tensors, golden = GOLDEN[document]
    config, _, timesteps, labels, _ = DOCUMENTS[document]
    # In float64: sums in float32 differ by 2e-5 from processor to processor.
    weights, _, out = compute_outputs(config, size, timesteps, t, labels, torch.float64)
    assert (sum(p.numel() for p in weights), len(weights)) == (parameters, tensors)
    found = torch.cat([out[0, 0, 0, :4], out[1, 2, -1, -1:], out.mean()[None]])
    assert found.tolist() == pytest.approx(golden, abs=1e-5)


@pytest.mark.parametrize(("config", "size", "classes", "expected"), [
    (ContextUNetConfig(channel_mult=(1, 1, 2, 4, 8, 8)), 256, 5, 54_593_475),  # 001 at 256x256, mended
    (MHAUNetConfig(form="tutorial", time_width=256), 64, 0, 23_332_739),  # counted from our own layers
])  # fmt: skip
def test_other_forms_have_their_parameters_and_give_images(config, size, classes, expected):
    net = build_network(config, size, 3, 3, 0, classes, "meta")
    assert sum(p.numel() for p in net.parameters()) == expected
    x_t = torch.zeros(2, 3, size, size, device="meta")
    assert net(x_t, torch.zeros(2, dtype=torch.int64, device="meta")).shape == x_t.shape


SMALL = ContextUNetConfig(channels=8, channel_mult=(1, 3, 2), norm_groups=4)
CLASSES = 5


def small(num_classes=CLASSES):
    net = build_network(SMALL, 8, 3, 3, 0, num_classes).eval()
    with torch.no_grad():
        net.conv_out.weight *= 1e5  # awake: the first output is near zero
    return net


NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_vector_is_a_context_and_a_label_its_one_hot_row():
    net, x_t, t = small().double(), NOISE.double(), torch.tensor([1, 5])
    vectors = torch.eye(CLASSES, dtype=torch.float64)[[1, 3]]
    with torch.no_grad():
        assert torch.equal(net(x_t, t, torch.tensor([1, 3])), net(x_t, t, vectors))
        assert torch.equal(net(x_t, t), net(x_t, t, torch.zeros(2, CLASSES)))
        mixed = net(x_t, t, 0.8 * vectors + 0.2 * vectors.flip(0))
        assert (mixed - net(x_t, t, vectors)).abs().max() > 1e-8


def test_labels_and_contexts_that_it_does_not_know_are_refused():
    unknown = ((f"the label {n}; this network knows 0 to 4, and -1", [0, n]) for n in (-2, CLASSES, 1000))
    vectors = (r"a float vector per image \(2, 5\)", [[0.0] * (CLASSES + 1)] * 2)
    for message, context in (*unknown, ("one label per image", [0]), vectors):
        with pytest.raises(ValueError, match=message):
            small()(NOISE, torch.tensor([1, 2]), torch.tensor(context))
    with pytest.raises(ValueError, match="without classes"):
        small(num_classes=0)(NOISE, torch.tensor([1, 2]), torch.tensor([0, 0]))


BARS = 4


def test_learns_to_draw_the_class_that_is_asked_for():
    """8x8 images of class k: one bright bar (rows 0-1, rows 6-7, columns 0-1, columns 6-7), with noise."""
    bars = -torch.ones(BARS, 1, 8, 8)
    bars[0, 0, :2], bars[1, 0, 6:], bars[2, 0, :, :2], bars[3, 0, :, 6:] = 1, 1, 1, 1
    settings = TrainConfig(
        steps=160, batch_size=12, accumulate=1, random_flip=False, lr=2e-2, lr_decay="linear",
        warmup_steps=10, grad_clip=1.0, ema_decay=(0.95,), ema_warmup=True, label_dropout=0.1, precision="fp32",
    )  # fmt: skip
    diffusion = Diffusion(DiffusionConfig(timesteps=100, beta_end=0.1))
    config = ContextUNetConfig(channels=12, channel_mult=(1, 2), norm_groups=4)
    net = build_network(config, 8, 1, 1, seed=0, num_classes=BARS, timesteps=len(diffusion))
    state = TrainState(settings, net, diffusion.config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(settings.steps):
        labels = torch.randint(0, BARS, (12,), generator=generator)
        x_0 = (bars[labels] + 0.1 * torch.randn(12, 1, 8, 8, generator=generator)).clamp(-1, 1)
        train_step(state, diffusion, x_0, torch.arange(12), config=settings, seed=1, context=labels)
    net.load_state_dict(state.emas[0].state_dict())
    asked = torch.arange(40) % BARS
    images = sample(
        diffusion, add_guidance(net.eval(), 2.0, NO_LABEL), index=torch.arange(40), shape=(1, 8, 8), seed=3,
        sampler="ddim", steps=10, context=asked,
    )  # fmt: skip
    found = torch.cdist(images.flatten(1), bars.flatten(1)).argmin(dim=1)
    assert (found == asked).float().mean() >= 0.8  # chance is 0.25
    assert (images - bars[asked]).abs().mean() < 0.5
