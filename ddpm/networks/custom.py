"""Custom networks: a user's class, which a configuration names as `package.module:Class`. This module imports no torch.

The arguments of the class are the settings of the network, except those in GIVEN, which the program fills in.
"""

import typing
from collections.abc import Mapping
from dataclasses import field, fields, make_dataclass
from functools import cache
from importlib import import_module
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from ddpm.config import Problems, Range, find_value_problems

if typing.TYPE_CHECKING:
    from torch import Tensor

GIVEN = ("image_size", "in_channels", "out_channels", "num_classes", "timesteps")


class CustomNetwork(Protocol):
    """Interface of a custom network, a `torch.nn.Module`. Only `forward` is required.

    takes_labels: if true, the context is labels, int64 (N,), -1 for none; otherwise None. reset_parameters(generator)
    draws the initial weights; without it they are those of the constructor, under the seed. The static method
    problems(image_size, **settings) lists (setting, what is wrong with it).
    """

    def forward(self, x_t: "Tensor", t: "Tensor", context: "Tensor | None" = None) -> "Tensor":
        """Predict for images x_t (N, in_channels, H, W) at t (N,), int64 in 0..timesteps-1; context None: no labels.

        Returns (N, out_channels, H, W) in the type of x_t.
        """


class CustomConfig:
    """Settings of a custom network: `name`, and the arguments of the class `network`."""

    name: str
    network: ClassVar[type]

    @property
    def takes_labels(self) -> bool:
        return bool(getattr(self.network, "takes_labels", False))

    @property
    def settings(self) -> dict[str, Any]:
        names = (each.name for each in fields(self) if each.name != "name")  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def list_code(cls) -> list[str]:
        """List the paths of the code: the folder of the package that holds the class, or the file of its module."""
        top = import_module(cls.name.partition(":")[0].partition(".")[0])
        return [*getattr(top, "__path__", [])] or [str(top.__file__)]

    def find_problems(self, image_size: int) -> Problems:
        check = getattr(self.network, "problems", None)
        if (found := find_value_problems(self)) or not check:
            return found
        try:
            return [(str(key), problem) for key, problem in check(image_size, **self.settings)]
        except Exception as error:  # the code of its author may raise anything
            rule = "its problems(image_size, **settings) must list (setting, what is wrong with it)"
            return [("name", f"is {self.name}: {rule} ({type(error).__name__}: {error})")]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.name, self.settings)


def _restore(name: str, settings: Mapping[str, Any]) -> CustomConfig:
    """Make the settings again in the process that unpickles them."""
    return make_config_class(name)(**settings)


@cache
def make_config_class(name: str) -> type[CustomConfig]:
    """Make the dataclass of the settings of a custom network, `package.module:Class`.

    Raises ValueError (NameError for an unknown type) if the class cannot be imported, is no network, or has arguments
    that a configuration cannot hold.
    """
    network = _import_network(name)
    hints = get_type_hints(network.__init__, include_extras=True)  # type: ignore[misc]
    settings: list[Any] = [("name", Literal[name], field(default=name))]
    for key, parameter in signature(network).parameters.items():
        if key in GIVEN:
            continue
        default = parameter.default
        kind: Any = hints.get(key, type(default))
        if kind is tuple and default:
            kind = tuple[type(default[0]), ...]  # type: ignore[misc]
        named = parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY) and key != "name"
        if not (named and _is_plain(kind)):
            allowed = "named ones of int, float, bool, str, None, Literal and tuple[..., ...], but `name`"
            raise ValueError(f"has the argument {parameter}; a configuration can hold {allowed}")
        settings.append((key, kind, field() if default is Parameter.empty else field(default=default)))
    return make_dataclass(
        "CustomConfig", settings, bases=(CustomConfig,), namespace={"network": network}, frozen=True, kw_only=True,
    )  # fmt: skip


def _import_network(name: str) -> type:
    """Import a class, which must have a forward method like that of the networks."""
    module, _, attribute = name.partition(":")
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:  # the code of its author may raise anything, as a script does
        remedy = "start in the folder of its module, or install it"
        raise ValueError(f"cannot be imported ({type(error).__name__}: {error}); {remedy}") from error
    network = getattr(found, attribute, None)
    try:
        if not isinstance(network, type):
            raise TypeError(f"{module} has no such class")
        signature(network.forward).bind("self", "x_t", "t", "context")  # type: ignore[attr-defined]
    except (TypeError, AttributeError) as error:
        raise ValueError(f"is no network, a class with forward(x_t, t, context=None): {error}") from error
    return network


def _is_plain(kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_plain(arguments[0]) and isinstance(arguments[1], Range)
    if origin is tuple:
        return arguments[1:] == (...,) and _is_plain(arguments[0])
    if origin in (Union, UnionType):
        return all(map(_is_plain, arguments))
    return origin is Literal or kind in (bool, int, float, str, NoneType)
