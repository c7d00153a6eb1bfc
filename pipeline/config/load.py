"""Loads and writes experiments and clusters; all problems of a file are reported at once, one line each."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from ddpm.networks import NETWORKS, find_config_class
from ddpm.networks.config import UNetConfig
from pipeline.config import checks
from pipeline.config.checks import ProblemsByKey, Tree, Types
from pipeline.config.experiment import Experiment
from pipeline.config.files import apply_overrides, find_configuration, read_configuration
from pipeline.config.neutral import add_neutral_values
from pipeline.config.sections import SPLITS, ClusterConfig
from pipeline.errors import ConfigError

# The keys that hold paths.
PATHS = [
    ("data", "path"), ("diffusion", "betas"), ("published", "path"),
    ("evaluate", "extractor_weights"), ("evaluate", "reference"),
]  # fmt: skip

Names = Mapping[str, Iterable[str]]  # dotted key -> the names that it may hold


def load_experiment(name: str, overrides: list[str], known: Names | None = None) -> Experiment:
    """Load and check an experiment. Raises ConfigError with every problem.

    `known`: the names of data sources, metrics and figures, from their registries; without it they are not checked.
    """
    values, problems = _convert_experiment(name, overrides, known)
    if problems:
        # Without the wrong overrides, the others can still be compared with each other.
        right = [word for word in overrides if word.partition("=")[0] not in problems]
        values, left = _convert_experiment(name, right, known)
        if left:
            raise ConfigError(_format_problems(problems))
    experiment = Experiment(**values)
    more = [f"{key} {problem}" for key, problem in experiment.find_problems() if key not in problems]
    if problems or more:
        raise ConfigError([*_format_problems(problems), *more])
    for name, key in PATHS:  # workers have other working folders
        section = getattr(experiment, name)
        if _is_path(key, path := getattr(section, key)):
            section = dataclasses.replace(section, **{key: str(Path(path).expanduser().absolute())})
            experiment = dataclasses.replace(experiment, **{name: section})
    return experiment


def _convert_experiment(name: str, overrides: list[str], known: Names | None) -> tuple[Tree, ProblemsByKey]:
    tree, types = _read_experiment(name, overrides)
    diffusion = tree.get("diffusion")
    if isinstance(diffusion, dict) and isinstance(path := diffusion.get("betas"), str):
        diffusion["betas"] = _read_betas(path)
    values, problems = checks.convert_values(types, tree)
    networks = [*NETWORKS, getattr(types["model"], "name", "")]  # perhaps a custom network
    return values, problems | checks.find_unknown_names(tree, {"model.name": networks, **(known or {})})


def _read_experiment(name: str, overrides: list[str]) -> tuple[Tree, Types]:
    """Return the file's values with the overrides, and the type of each key."""
    path = find_configuration(name)
    types = checks.get_field_types(Experiment)
    tree = apply_overrides({"name": path.stem, **read_configuration(path)}, overrides, Experiment)
    # An unknown network is refused by its name, not by its keys.
    name = checks.flatten(tree).get("model.name", "unet")
    try:
        network: checks.Kind = find_config_class(name) if isinstance(name, str) else UNetConfig
    except KeyError:
        network = dict
    except (ValueError, NameError) as error:
        raise ConfigError(f"model.name={name} {error}") from error
    types = {**types, "model": network}
    sections = {key: kind for key, kind in types.items() if checks.is_section(kind)}
    add_neutral_values(tree, {key: checks.get_field_types(kind) for key, kind in sections.items()})
    return tree, types


def _format_problems(problems: ProblemsByKey) -> list[str]:
    return [f"{key} {problem}" for key, problem in problems.items()]


def _read_betas(path: str) -> list[float]:
    """Read the betas of a schedule, one for each timestep. Raises ConfigError."""
    import numpy as np  # here, so that other configurations are read without it

    try:
        if not (file := Path(path).expanduser()).is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        betas = np.load(file, allow_pickle=False)
        if betas.ndim != 1 or betas.dtype.kind != "f":
            raise ValueError(f"{betas.dtype} of shape {betas.shape}; a float for each timestep is expected")
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise ConfigError(f"diffusion.betas={path} is no .npy file of a schedule: {error}") from error
    return list(betas.tolist())


def _is_path(key: str, value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value) and not (key == "reference" and value in SPLITS)


def find_relative_paths(name: str, overrides: list[str]) -> list[str]:
    """Return an experiment's relative paths, as 'data.path=images'; on another machine they name other files."""
    tree, _ = _read_experiment(name, overrides)
    values = [(f"{section}.{key}", key, tree[section][key]) for section, key in PATHS]
    return [f"{full}={path}" for full, key, path in values if _is_path(key, path) and path[0] != "/"]


def load_cluster(name: str, overrides: list[str]) -> ClusterConfig:
    """Load and check a cluster; the overrides come without `cluster.`. Raises ConfigError with every problem."""
    file = read_configuration(find_configuration(name, "cluster"), "cluster")
    tree = {"cluster": apply_overrides(file, overrides, ClusterConfig)}
    values, problems = checks.convert_values({"cluster": ClusterConfig}, tree)
    problems = problems or {f"cluster.{key}": problem for key, problem in values["cluster"].find_problems()}
    if problems:
        raise ConfigError(_format_problems(problems))
    return values["cluster"]


def read_value(key: str, value: Any) -> Any:
    """Convert a text, or a list of texts, to the type of an experiment's key, which may be one of its network."""
    if isinstance(value, list):
        return [read_value(key, item) for item in value]
    kind = checks.find_type(Experiment, key)
    return value if checks.takes_text(kind) else checks.parse_text(bool | int | float, value)


def to_yaml(section: object, **more: object) -> str:
    """Return a dataclass or plain containers as yaml, with `more` top-level keys after its own."""
    own = section if isinstance(section, dict) else checks.to_dict(section)
    content = json.loads(json.dumps({**own, **more}))  # without shared parts, which yaml would name
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
