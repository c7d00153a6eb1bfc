"""A user's class as a network: its arguments, its weights, and what is refused."""

import pickle
from typing import Annotated, Literal

import pytest
import torch
from torch import nn

from ddpm.config import Range
from ddpm.networks.build import build_network, check_output
from ddpm.networks.custom import make_config_class


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


@pytest.mark.parametrize(
    "name, reason",
    [("Strange", r"\*\*more"), ("Held", "pair"), ("Unfit", "forward"), ("pickle", "such"), ("Gone", "such")],
)
def test_a_class_that_is_no_network_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        find(name)


@pytest.mark.parametrize(
    "change, found",
    [(lambda x: x[:, :, 1:], r"\(2, 1, 7, 8\)"), (lambda x: x.double(), "float64"), (tuple, "tuple")],
)
def test_an_output_of_another_shape_or_type_is_refused(change, found):
    net = build_network(find("Net"), 8, 1, 1, seed=0)
    check_output(net, (1, 8, 8), 1, takes_labels=True)
    net.register_forward_hook(lambda _net, _inputs, output: change(output))
    with pytest.raises(ValueError, match=found):
        check_output(net, (1, 8, 8), 1, takes_labels=False)
