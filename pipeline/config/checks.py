"""Check plain values against the types of dataclasses. pydantic finds all faults in one pass; the words are ours.

A field says by its type what it may hold: a choice is a `Literal`, a list a tuple, a number may have a `Range`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from functools import cache
from inspect import Parameter, signature
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
)
from pydantic_core import ErrorDetails

from ddpm.config import Range
from pipeline.errors import suggest

Tree = dict[str, Any]  # plain containers, as yaml has them
Types = Mapping[str, Any]  # key -> what it may hold
Faults = dict[str, str]  # dotted key -> what is wrong with it; f"{key} {fault}" is one line

STRICT = ConfigDict(extra="forbid", strict=True)
OUT_OF_RANGE = {"greater_than_equal", "greater_than", "less_than_equal", "less_than"}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def get_field_types(cls: type) -> Types:
    """Return what each key of a section may hold; fields that no file has are left out."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(cls)
        if field.metadata.get("in_file", True)
    }


def flatten(tree: Tree, prefix: str = "") -> Tree:
    """Return nested sections as dotted keys."""
    flat: Tree = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def takes_text(kind: Any) -> bool:
    """Whether a key of this type holds a text."""
    return kind is str or (get_origin(kind) is not tuple and str in get_args(kind))


def convert_values(types: Types, tree: Tree, complete: bool = True) -> tuple[Tree, Faults]:
    """Turn a tree into values of these types, sections into their dataclasses; where there are faults, give these.

    `complete`: every key must be there, whatever its default. One value stands for a list of one.
    """
    try:
        model = _create_model({name: (_strict(kind, complete), ...) for name, kind in types.items()})
        return dict(model.model_validate_json(json.dumps(tree, default=str))), {}
    except ValidationError as error:
        # A key that may be of several types has a fault of each: the first one, told from the whole type, is enough.
        faults: Faults = {}
        for fault in error.errors(include_url=False):
            key, reason = _describe(types, fault)
            faults.setdefault(key, reason)
        return {}, faults


def find_unknown_names(tree: Tree, known: Mapping[str, Iterable[str]]) -> Faults:
    """Find the names in a tree that are not among those known for their (dotted) key."""
    faults, values = {}, flatten(tree)
    for key, names in known.items():
        value = values.get(key)
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and word not in names:
                verb = "has" if isinstance(value, list) else "is"
                faults[key] = f"{verb} '{word}'; {_one_of(names, word)} is expected"
    return faults


# The checker: a pydantic model for each section


def _create_model(fields: Any) -> type[BaseModel]:
    return create_model("Section", __config__=STRICT, **fields)


@cache
def _strict(kind: Any, complete: bool) -> Any:
    """Write the type of a field as pydantic knows it."""
    if is_section(kind):
        arguments = signature(kind).parameters
        fields = {}
        for name, inside in get_field_types(kind).items():
            needed = complete or arguments[name].default is Parameter.empty
            fields[name] = _strict(inside, complete), ... if needed else None

        def build(found: BaseModel) -> Any:
            return kind(**{name: getattr(found, name) for name in found.model_fields_set})

        return Annotated[_create_model(fields), AfterValidator(build)]
    if get_origin(kind) is Annotated:
        inner, limits = get_args(kind)
        return Annotated[_strict(inner, complete), Field(**dataclasses.asdict(limits))]
    if get_origin(kind) is tuple:
        item: Any = _strict(get_args(kind)[0], complete)
        return Annotated[tuple[item, ...], BeforeValidator(_as_tuple)]
    return Annotated[kind, BeforeValidator(_as_text)] if takes_text(kind) else kind


def is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _as_tuple(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# Faults in a user's words


def _describe(types: Types, fault: ErrorDetails) -> tuple[str, str]:
    """Return the key that a fault is about, and what is wrong with it."""
    names, kind, known, verb = [], None, types, "is"
    for part in fault["loc"]:
        if isinstance(part, int):  # the place in a list
            kind, verb = get_args(_bare(kind))[0], "has"
        elif kind is None or is_section(kind):
            known = types if kind is None else get_field_types(kind)
            kind = known.get(part)
            names.append(part)
    return ".".join(names), _reason(fault["type"], fault["input"], verb, kind, known, names)


def _reason(fault: str, value: object, verb: str, kind: Any, known: Types, names: list[str]) -> str:
    if fault == "missing":
        return "is missing"
    if fault == "extra_forbidden":
        return f"is unknown{_near_key(names, known)}"
    if is_section(kind):
        return f"is {value!r}; it is a section with the keys {', '.join(get_field_types(kind))}"
    if fault in OUT_OF_RANGE:
        (limits,) = (argument for argument in get_args(kind) if isinstance(argument, Range))
        return f"{verb} {value}; it must be {limits}"
    return f"{verb} {value!r}; {_expected(kind, value)} is expected"


def _near_key(names: list[str], known: Types) -> str:
    """Suggest a key for an unknown one; one above the sections may belong into one of them."""
    name = names[-1]
    if len(names) > 1:
        return suggest(name, known)
    sections = {key: kind for key, kind in known.items() if is_section(kind)}
    inner = [f"{key}.{below}" for key, kind in sections.items() for below in get_field_types(kind)]
    exact = [key for key in inner if key.endswith(f".{name}")]
    return suggest(exact[0] if exact else name, [*known, *inner])


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _expected(kind: Any, value: object) -> str:
    """Say what a type admits."""
    kind = _bare(kind)
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind), value)
    if get_origin(kind) is tuple:
        return f"a list of {_expected(get_args(kind)[0], value)}"
    return WORDS.get(kind) or " or ".join(_expected(option, value) for option in get_args(kind))


def _one_of(choices: Iterable[object], value: object) -> str:
    words = list(map(str, choices))
    return f"one of {', '.join(words)}{suggest(str(value), words)}"
