"""Checks of plain values against the types of dataclasses, by pydantic, with messages of our own.

The type of a field defines its values: a choice is a `Literal`, a list is a tuple, a number may have a `Range`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache, partial
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from ddpm.config import Range
from ddpm.networks.custom import CustomConfig
from pipeline.errors import suggest

Tree = dict[str, Any]  # plain containers, as yaml has them
Kind = type | UnionType  # the type of a key: also the forms Annotated[...], Literal[...] and tuple[...]
Types = Mapping[str, Kind]  # by key
ProblemsByKey = dict[str, str]  # dotted key -> what is wrong with it; f"{key} {problem}" is one line

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# YAML 1.2's core rules: no 010 for eight, no 1:30 for ninety, no 1_000.
WHOLE = re.compile(r"[-+]?[0-9]{1,400}|0o[0-7]{1,99}|0x[0-9a-fA-F]{1,99}")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]{1,400}(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
OUT_OF_RANGE = {"greater_than_equal", "greater_than", "less_than_equal", "less_than"}
WORDS: dict[Kind, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null",
}  # fmt: skip


def get_field_types(cls: type) -> Types:
    """Return the type of each key of a section, without the fields that no file can set."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(cls)
        if field.metadata.get("in_file", True)
    }


def is_section(kind: Kind | None) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def to_dict(section: Any) -> Tree:
    """Return a dataclass as plain containers, tuples as lists."""
    tree = json.loads(json.dumps(dataclasses.asdict(section)))
    return {key: value for key, value in tree.items() if key in get_field_types(type(section))}


def flatten(tree: Tree, prefix: str = "") -> Tree:
    flat: Tree = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def takes_text(kind: Kind | None) -> bool:
    """Return whether a key of this type holds a text."""
    return kind is str or (get_origin(kind) is not tuple and str in get_args(kind))


def find_type(cls: type, key: str) -> Kind | None:
    """Return the type of a dotted key below a section; None for one that is unknown."""
    section, _, name = key.rpartition(".")
    kind = get_field_types(cls).get(section) if section else cls
    return get_field_types(kind).get(name) if is_section(kind) else None


def parse_text(kind: Kind, value: object) -> object:
    """Parse a text as a value of this type; return the text itself if it cannot be one."""
    if not isinstance(value, str) or takes_text(kind):
        return value
    kinds = {option if isinstance(option, type) else type(option) for option in _list_options(kind)}
    if bool in kinds and value.lower() in yaml.SafeLoader.bool_values:
        return yaml.SafeLoader.bool_values[value.lower()]
    number = float(value) if NUMBER.fullmatch(value) else math.nan
    if int in kinds and WHOLE.fullmatch(value):
        return int(value, 0) if value[1:2] in ("o", "x") else int(value)
    if float in kinds and math.isfinite(number):
        return number
    return int(number) if int in kinds and number.is_integer() else value  # 1e4


def _list_options(kind: Kind) -> list[object]:
    """Return the plain types, and the values of choices, that a type allows."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [option for part in get_args(kind) for option in _list_options(part)] or [kind]


def convert_values(types: Types, tree: Tree, complete: bool = True) -> tuple[Tree, ProblemsByKey]:
    """Convert a tree's values to dataclasses; return these and the problems, one of which is empty.

    complete: every key must be there, even one with a default. A single value is read as a list of one.
    """
    try:
        fields: Any = {name: (_make_pydantic_type(kind, complete), ...) for name, kind in types.items()}
        model = create_model("Values", __config__=STRICT, **fields)
        return dict(model.model_validate(tree)), {}
    except ValidationError as error:
        # A key of several possible types has a problem for each: one message that describes the whole type is enough.
        problems: ProblemsByKey = {}
        for found in error.errors(include_url=False):
            key, reason = _describe_problem(types, found)
            problems.setdefault(key, reason)
        return {}, problems


def find_unknown_names(tree: Tree, known: Mapping[str, Iterable[str]]) -> ProblemsByKey:
    """Return a problem for each (dotted) key whose value is not a known name."""
    problems, values = {}, flatten(tree)
    for key, names in known.items():
        value = values.get(key)
        verb, words = ("has", value) if isinstance(value, list) else ("is", [value])
        for word in words:
            if isinstance(word, str) and word not in names:
                expected = f"{_format_choices(names)} is expected{_suggest(word, names)}"
                problems[key] = f"{verb} '{word}'; {expected}"
            elif words.count(word) > 1:
                problems.setdefault(key, f"has '{word}' twice; each may stand there once")
    return problems


@cache
def _make_pydantic_type(kind: Kind, complete: bool) -> Any:
    """Return pydantic's type of a field; a section is a model that becomes its dataclass."""
    if is_section(kind):
        arguments = signature(kind).parameters
        complete = complete and not issubclass(kind, CustomConfig)  # its class has the defaults
        fields: Any = {}
        for name, inside in get_field_types(kind).items():
            needed = complete or arguments[name].default is Parameter.empty
            fields[name] = _make_pydantic_type(inside, complete), ... if needed else None

        def build(found):
            return kind(**{name: getattr(found, name) for name in found.model_fields_set})

        return Annotated[create_model("Section", __config__=STRICT, **fields), AfterValidator(build)]
    if get_origin(kind) is Annotated:
        inner, limits = get_args(kind)
        limited = Field(**dataclasses.asdict(limits))
        return Annotated[inner, limited, BeforeValidator(partial(parse_text, inner))]
    if get_origin(kind) is tuple:
        item: Any = _make_pydantic_type(get_args(kind)[0], complete)
        to_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else (value,))
        return Annotated[tuple[item, ...], to_tuple]
    check = AfterValidator(_require_text) if takes_text(kind) else BeforeValidator(partial(parse_text, kind))
    return Annotated[kind, check]


def _require_text(value: str | None) -> str | None:
    if value is not None and (not value or "\0" in value):
        raise ValueError("an empty text, or one that cannot be a path")
    return value


# The messages


def _describe_problem(types: Types, problem: ErrorDetails) -> tuple[str, str]:
    """Return the key and the message of a problem that pydantic found."""
    names: list[str] = []
    kind: Kind = NoneType  # at the root
    known, verb = types, "is"
    for part in problem["loc"]:
        if isinstance(part, int):  # the position in a list
            kind, verb = get_args(_strip_range(kind))[0], "has"
        elif kind is NoneType or is_section(kind):
            known = get_field_types(kind) if is_section(kind) else types
            kind = known.get(part, NoneType)
            names.append(part)
    value = problem["input"]
    if problem["type"] == "missing":
        reason = "is missing"
    elif problem["type"] == "extra_forbidden":
        reason = f"is unknown{_suggest_key(names, known)}"
    elif is_section(kind):
        reason = f"is {value!r:.99}; it is a section: write one of its keys, {names[-1]}.key=value"
    elif problem["type"] in OUT_OF_RANGE:
        (limits,) = (argument for argument in get_args(kind) if isinstance(argument, Range))
        reason = f"{verb} {value}; it must be {limits}"
    else:
        what = "null" if value is None else "empty" if value == "" else repr(value)[:99]
        reason = f"{verb} {what}; {_describe_type(kind)} is expected{_suggest(value, _list_options(kind))}"
    return ".".join(names), reason


def _suggest_key(names: list[str], known: Types) -> str:
    """Suggest a known key; for a key without a section, search all sections too."""
    name = names[-1]
    if len(names) > 1:
        return suggest(name, known)
    sections = {key: kind for key, kind in known.items() if is_section(kind)}
    inner = [f"{key}.{below}" for key, kind in sections.items() for below in get_field_types(kind)]
    exact = [key for key in inner if key.endswith(f".{name}")]
    return suggest(exact[0] if exact else name, [*known, *inner])


def _strip_range(kind: Kind) -> Kind:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _describe_type(kind: Kind) -> str:
    kind = _strip_range(kind)
    if get_origin(kind) is Literal:
        return _format_choices(get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list of {_describe_type(get_args(kind)[0])}"
    return WORDS.get(kind) or " or ".join(map(_describe_type, get_args(kind)))


def _format_choices(choices: Iterable[object]) -> str:
    return f"one of {', '.join(map(str, choices))}"


def _suggest(value: object, choices: Iterable[object]) -> str:
    """Suggest what the user meant: a list, written [a,b], or a similar word."""
    if not isinstance(value, str):
        return ""
    if "," in value:
        return f"; a list is written [{value}]"
    return suggest(value, (word for word in choices if isinstance(word, str)))
