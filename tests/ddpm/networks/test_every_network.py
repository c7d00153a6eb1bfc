"""Duties of every network, and of a user's class: learn, be sampled, resume bit for bit, depend on a seed."""

import copy
import dataclasses
import pickle
from typing import Annotated, Literal
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from ddpm.config import DiffusionConfig, Range, TrainConfig
from ddpm.diffusion import Diffusion
from ddpm.kernels import accelerate
from ddpm.networks import NETWORKS, NO_LABEL, UNTRAINED, custom
from ddpm.networks.build import CLASSES, build_network, check_network
from ddpm.networks.custom import make_config_class
from ddpm.sampler import add_guidance, sample
from ddpm.training import TrainState, train_step

LABEL_CLASSES = 3
SIZE = 16
UNET = {"channels": 8, "channel_mult": (1, 2), "attention_resolutions": (8,), "norm_groups": 4}
CONTEXT = {"channels": 8, "norm_groups": 4}
MHA = {"channels": 8, "channel_mult": (1, 2, 2), "time_width": 16}
SETTINGS = {
    "unet": UNET,
    "unet-classes": {**UNET, "class_conditional": True},
    "annotated_unet": {
        "pos_dim": 8, "channels_per_depth": (4, 8), "attention_depths": (2,), "num_heads": 2, "norm_groups": 4
    },
    "api_unet": {
        "pos_dim": 8, "emb_dim": 16, "channels_per_depth": (4, 8, 12), "num_res_blocks": 1, "norm_groups": 4,
    },
    "context_unet": CONTEXT,
    "context_unet-group": {**CONTEXT, "norm": "group"},
    "context_unet-deep": {**CONTEXT, "channel_mult": (1, 2, 1, 3)},
    "mha_unet": MHA,
    "mha_unet-tutorial": {**MHA, "form": "tutorial"},
}  # fmt: skip
CONFIGS = {name: NETWORKS[name.split("-")[0]](**settings) for name, settings in SETTINGS.items()}
every_network = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
DIFFUSION = Diffusion(DiffusionConfig(timesteps=3))
PIXELS = torch.randint(0, 256, (6, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
NOISE = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
TRAIN = TrainConfig(
    steps=100, batch_size=6, accumulate=2, random_flip=True, lr=1e-3, lr_decay="none", warmup_steps=0,
    grad_clip=1.0, ema_decay=(0.5, 0.9), ema_warmup=True, label_dropout=0.3, precision="fp32",
)  # fmt: skip


def classes(config):
    return LABEL_CLASSES if config.takes_labels else 0


def build(config, seed=0, **kwargs):
    return accelerate(build_network(config, SIZE, 3, 3, seed, num_classes=classes(config), **kwargs))


def state_of(config, seed=0):
    """Awake: the paper's networks pass hardly a gradient at their first weights."""
    net, generator = build(config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return TrainState(TRAIN, net.to(memory_format=torch.channels_last), DIFFUSION.config)


def updates(state, count, settings=TRAIN):
    context = LABELS if classes(state.net.config) else None
    return [
        train_step(state, DIFFUSION, PIXELS, torch.arange(6), config=settings, seed=4, context=context)
        for _ in range(count)
    ]


def drawn(net, context=None, count=4, **kwargs):
    settings = {"index": torch.arange(count), "shape": (3, SIZE, SIZE), "seed": 2, "context": context}
    return sample(DIFFUSION, net, **settings, **kwargs)


def test_all_networks_are_tested_here_and_some_refuse_labels():
    assert {config.name for config in CONFIGS.values()} == CLASSES.keys() == NETWORKS.keys() - UNTRAINED
    assert all(NETWORKS[name]().name == name for name in NETWORKS)
    for name in {config.name for config in CONFIGS.values() if not config.takes_labels}:
        with pytest.raises(ValueError, match=rf"model.name={name} takes no labels: set data.labels=0"):
            build_network(CONFIGS[name], SIZE, 3, 3, seed=0, num_classes=2)


@every_network
def test_trains_resumes_bit_for_bit_averages_and_samples(config):
    state, resumed = state_of(config), state_of(config, seed=7)
    before = copy.deepcopy(state.net.state_dict())
    updates(state, 2)
    saved = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    metrics = updates(state, 2)
    assert all(torch.isfinite(value) for step in metrics for value in step.values())
    assert [name for name, p in state.net.named_parameters() if torch.equal(before[name], p)] == []
    resumed.load_state_dict(saved)
    torch.rand(5)  # the process's own history must not matter
    updates(resumed, 2)
    expected, found = state.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    averaged = build(config, device="meta").to_empty(device="cpu")
    averaged.load_state_dict(state.emas[0].state_dict())  # strict: buffers too
    labels = torch.tensor([0, 1, 2, NO_LABEL]) if classes(config) else None
    images = drawn(averaged.eval(), labels)
    assert images.shape == (4, 3, SIZE, SIZE) and images.isfinite().all()
    assert not torch.equal(images, drawn(state.net.eval(), labels))
    torch.testing.assert_close(images[:2], drawn(averaged, labels if labels is None else labels[:2], count=2))


@every_network
def test_guidance(config):
    net, labels = state_of(config).net.eval(), LABELS[:4]
    if not classes(config):
        with pytest.raises(ValueError, match=r"takes no labels.*data\.labels"):
            drawn(net, labels)
        return
    chosen, none = drawn(net, labels), drawn(net, torch.full_like(labels, NO_LABEL))
    torch.testing.assert_close(drawn(add_guidance(net, 1.0, NO_LABEL), labels), chosen, atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn(add_guidance(net, 0.0, NO_LABEL), labels), none, atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn(net), none, atol=1e-4, rtol=0)
    assert (drawn(add_guidance(net, 3.0, NO_LABEL), labels) - chosen).abs().max() > 1e-5


@every_network
def test_output_is_float32_under_autocast_and_close_to_it(config):
    net, t = state_of(config).net.eval(), torch.tensor([5, 999])
    with torch.no_grad():
        full = net(NOISE, t)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(NOISE, t)
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().max() < 0.1 * full.abs().max()


@every_network
def test_weights_depend_on_the_seed_alone_and_give_nearly_zero(config):
    before = torch.get_rng_state()
    first, again, other = (build(config, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    weights = [name for name in first if first[name].dim() > 1]
    assert weights and not any(torch.equal(first[name], other[name]) for name in weights)
    assert 0 < build(config).eval()(NOISE, torch.tensor([0, 999])).abs().max() < 1e-2
    # Drawn anew it is as new, buffers included: building leaves memory uninitialised until the draw.
    state = state_of(config)
    updates(state, 2)
    state.net.to(memory_format=torch.contiguous_format)  # draws follow the order in memory
    state.net.reset_parameters(torch.Generator().manual_seed(1))
    assert [name for name, p in state.net.state_dict().items() if not torch.equal(p, first[name])] == []


PROBLEMS = {
    "unet": [
        ({"norm_groups": 5}, 8, "norm_groups"), ({"channel_mult": (1, 2, 2)}, 10, "channel_mult"),
        ({"attention_resolutions": (9,)}, 8, "attention_resolutions"), ({"resample": "bicubic"}, 8, "resample"),
    ],
    "context_unet": [
        ({"channels": 7}, 8, "channels"), ({"channel_mult": (1, 1, 1, 1, 1)}, 8, "channel_mult"),
    ],
    "api_unet": [
        ({"pos_dim": 7}, 8, "pos_dim"), ({"channels_per_depth": (4, 6)}, 8, "norm_groups"),
        ({"attention_depths": (4,)}, 8, "attention_depths"), ({}, 10, "channels_per_depth"),
        ({"attention_residual": "none"}, 8, "attention_residual"),
    ],
    "mha_unet": [
        ({"num_heads": 3}, 8, "num_heads"), ({"time_width": 7}, 8, "time_width"), ({}, 10, "channel_mult"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("problem", [(name, *row) for name, rows in PROBLEMS.items() for row in rows])
def test_problems_name_the_key(problem):
    name, changes, image_size, key = problem
    settings = dataclasses.replace(CONFIGS[name], **changes)
    problems = settings.find_problems(image_size)
    assert key in [name for name, _ in problems] and not any("\n" in message for _, message in problems)
    with pytest.raises(ValueError, match=key):
        CLASSES[name](settings, image_size, 3, 3)


class Net(nn.Module):
    def __init__(
        self, in_channels, width=4, scales=(1, 2), *, mode: Literal["a", "b"] = "a",
        rate: Annotated[float, Range(lt=1)] = 0.5, best: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 1)
        self.register_buffer("constant", torch.full((1,), float(width)), persistent=False)

    def forward(self, x_t, t, context=None):
        return self.conv(x_t) + self.constant


class Drawn(Net):
    def reset_parameters(self, generator):
        nn.init.normal_(self.conv.weight, generator=generator)


Strange = type("Strange", (Net,), {"__init__": lambda self, **more: None})
Held = type("Held", (Net,), {"__init__": lambda self, pair=print: None})
Unfit = type("Unfit", (Net,), {"forward": lambda self, x_t, t: x_t})


def find(name, **settings):
    return make_config_class(f"{__name__}:{name}")(**settings)


def test_the_arguments_of_the_class_are_its_settings():
    config = find("Net", width=8)
    assert config.settings == {"width": 8, "scales": (1, 2), "mode": "a", "rate": 0.5, "best": None}
    assert pickle.loads(pickle.dumps(config)) == config, "as it travels to a worker"
    assert [key for key, _ in find("Net", mode="c", rate=1.0).find_problems(8)] == ["mode", "rate"]
    net = build_network(config, 8, 1, 1, seed=0, device="meta")
    assert net.constant == 8, "what is in no checkpoint is there"


@pytest.mark.parametrize("name", ["Net", "Drawn"])
def test_weights_depend_on_the_seed_alone(name):
    state = torch.get_rng_state()
    first, again, other = (build_network(find(name), 8, 1, 1, seed=seed).conv.weight for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)


SPOILED = {
    "other.weight": lambda net: setattr(net, "other", net.conv),  # two names for one weight
    "_extra_state": lambda net: setattr(net, "__class__", Extra),
    "uninitialized": lambda net: setattr(net, "conv", nn.LazyConv2d(1, 1)),
    "gradient": lambda net: net.register_forward_hook(lambda _net, _inputs, output: output.detach()),
    "changes": lambda net: net.register_forward_pre_hook(
        lambda _net, inputs: (inputs[0].mul_(2), *inputs[1:])
    ),
}
Extra = type("Extra", (Net,), {"get_extra_state": lambda self: {"a": 1}})


@pytest.mark.parametrize("reason", SPOILED)
def test_a_network_that_cannot_be_trained_or_saved_is_refused(reason):
    net = build_network(find("Net"), 8, 1, 1, seed=0)
    SPOILED[reason](net)
    with pytest.raises(ValueError, match=reason):
        check_network(net, (1, 8, 8), 1, takes_labels=False)


@pytest.mark.parametrize("problems", [lambda **_: 1 / 0, lambda image_size: [], lambda *_, **__: "width"])
def test_a_wrong_list_of_problems_is_a_problem(monkeypatch, problems):
    monkeypatch.setattr(Net, "problems", staticmethod(problems), raising=False)
    assert [key for key, _ in find("Net").find_problems(8)] == ["name"]


def test_a_module_that_ends_the_program_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(custom, "import_module", Mock(side_effect=SystemExit("a script")))
    with pytest.raises(ValueError, match="SystemExit: a script"):
        make_config_class("script:Net")


def test_what_is_no_network_or_has_an_output_of_another_shape_or_type_is_refused():
    refused = {"Strange": r"\*\*more", "Held": "pair", "Unfit": "forward", "pickle": "such", "Gone": "such"}
    for name, reason in refused.items():
        with pytest.raises(ValueError, match=reason):
            find(name)
    outputs = {r"\(2, 1, 7, 8\)": lambda x: x[:, :, 1:], "float64": torch.Tensor.double, "tuple": tuple}
    for found, change in outputs.items():
        net = build_network(find("Net"), 8, 1, 1, seed=0)
        check_network(net, (1, 8, 8), 1, takes_labels=True)
        net.register_forward_hook(lambda _net, _inputs, output, change=change: change(output))
        with pytest.raises(ValueError, match=found):
            check_network(net, (1, 8, 8), 1, takes_labels=False)
