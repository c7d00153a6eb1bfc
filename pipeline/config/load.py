"""From files and overrides to the dataclasses, and back. Every fault is reported at once, in one line each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from ddpm.networks import NETWORKS
from pipeline.config.checks import (
    Faults,
    Tree,
    Types,
    convert_values,
    find_unknown_names,
    flatten,
    get_field_types,
    is_section,
    takes_text,
)
from pipeline.config.files import apply_overrides, find_configuration, read_configuration
from pipeline.config.neutral import add_neutral_values
from pipeline.config.sections import SPLITS, ClusterConfig, Experiment
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The keys that hold paths.
PATHS = (
    ("data", "path"),
    ("published", "path"),
    ("evaluate", "extractor_weights"),
    ("evaluate", "reference"),
)

Names = Mapping[str, Iterable[str]]  # dotted key -> the names that it may hold


def load_experiment(name: str, overrides: list[str], known: Names | None = None) -> Experiment:
    """Read, override, check. Raises ConfigError with every fault.

    `known` are the names that the owners of data sources, metrics and figures know; without it they are not checked.
    """
    values, faults = _check_experiment(name, overrides, known)
    if faults:
        # Without the wrong overrides, the others can still be held against each other.
        right = [word for word in overrides if word.partition("=")[0] not in faults]
        values, left = _check_experiment(name, right, known)
        if left:
            raise ConfigError(_lines(faults))
    experiment = Experiment(**values)
    lines = [f"{key} {fault}" for key, fault in experiment.find_problems() if key not in faults]
    if lines or faults:
        raise ConfigError([*_lines(faults), *lines])
    return _with_absolute_paths(experiment)


def _check_experiment(name: str, overrides: list[str], known: Names | None) -> tuple[Tree, Faults]:
    tree, types = _read_experiment(name, overrides)
    values, faults = convert_values(types, tree)
    return values, faults | find_unknown_names(tree, {"model.name": NETWORKS, **(known or {})})


def _read_experiment(name: str, overrides: list[str]) -> tuple[Tree, Types]:
    """Return what the file says with the overrides, and what each key may hold."""
    path = find_configuration(name)
    known = get_field_types(Experiment)
    tree = apply_overrides({"name": path.stem, **read_configuration(path)}, _quote_texts(overrides, known))
    add_neutral_values(tree)
    network = str(flatten(tree).get("model.name", "unet"))
    return tree, {**known, "model": NETWORKS.get(network, Tree)}


def _quote_texts(overrides: list[str], types: Types) -> list[str]:
    """Quote the values of the keys that hold a text, unless they are: in a path, 007 is no number."""
    words = []
    for word in overrides:
        key, _, text = word.partition("=")
        section, _, name = key.rpartition(".")
        kind = types.get(section, str)
        known = types if not section else get_field_types(kind) if is_section(kind) else {}
        plain = text.lower() in ("", "null", "~") or text[0] in "\"'"
        words.append(
            word
            if plain or not takes_text(known.get(name))
            else f"{key}={json.dumps(text, ensure_ascii=False)}"
        )
    return words


def _lines(faults: Faults) -> list[str]:
    return [f"{key} {fault}" for key, fault in faults.items()]


def _with_absolute_paths(experiment: Experiment) -> Experiment:
    """Make paths mean the same in every process: workers have other working folders."""
    for name, key in PATHS:
        section = getattr(experiment, name)
        if _is_path(key, path := getattr(section, key)):
            section = dataclasses.replace(section, **{key: str(Path(path).expanduser().absolute())})
            experiment = dataclasses.replace(experiment, **{name: section})
    return experiment


def _is_path(key: str, value: str | None) -> bool:
    return bool(value) and not (key == "reference" and value in SPLITS)


def find_relative_paths(name: str, overrides: list[str]) -> list[str]:
    """Return the paths of a valid experiment that depend on the folder or the person, as 'data.path=images'."""
    tree, _ = _read_experiment(name, overrides)
    return [
        f"{section}.{key}={path}"
        for section, key in PATHS
        if _is_path(key, path := tree[section][key]) and path[0] != "/"
    ]


def load_cluster(name: str, overrides: list[str]) -> ClusterConfig:
    """Read a file of conf/cluster/, override, check; `overrides` without their `cluster.`."""
    typed = _quote_texts(overrides, get_field_types(ClusterConfig))
    tree = {"cluster": apply_overrides(read_configuration(find_configuration(name, "cluster")), typed)}
    values, faults = convert_values({"cluster": ClusterConfig}, tree)
    if lines := _lines(faults) or [
        f"cluster.{key} {fault}" for key, fault in values["cluster"].find_problems()
    ]:
        raise ConfigError(lines)
    return values["cluster"]


def to_dict(section: DataclassInstance) -> Tree:
    """Return a dataclass as plain containers, tuples as lists."""
    tree = json.loads(json.dumps(dataclasses.asdict(section)))
    return {key: value for key, value in tree.items() if key in get_field_types(type(section))}


def to_yaml(section: DataclassInstance, **more: object) -> str:
    """Write a dataclass as yaml, with `more` top-level keys after its own."""
    return OmegaConf.to_yaml(OmegaConf.create({**to_dict(section), **more}))
