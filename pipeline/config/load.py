"""From yaml files and overrides to the dataclasses. Every fault is reported at once, in one line each."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.networks import NETWORKS
from pipeline.config.checks import suggestion
from pipeline.config.neutral import add_neutral_values
from pipeline.config.sections import SPLITS, ClusterConfig, Experiment
from pipeline.errors import ConfigError

# The keys that hold paths.
PATHS = (("data", "path"), ("published", "path"), ("evaluate", "extractor_weights"))

# Finding and reading files


def conf_folders() -> list[Path]:
    """Where names are looked up: ./conf, then the conf/ that came with the program."""
    package = Path(__file__).parent.parent
    return [Path.cwd() / "conf", package / "conf", package.parent / "conf"]


def find(name: str, kind: Literal["", "cluster", "sweep"] = "") -> Path:
    """The file that `name` (a path, or a name in conf/) means."""
    if Path(name).suffix in (".yaml", ".yml"):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"{name} does not exist; give the path of a yaml file, or a name in conf/{kind}")
    folders = [folder / kind for folder in conf_folders()]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise ConfigError(
        f"no {kind or 'experiment'} is named '{name}'{suggestion(name, known)}; known: {', '.join(known)}"
    )


def _plain(tree: Any) -> dict[str, Any]:
    """Plain containers, interpolations resolved."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))


def _read(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    """The tree of a yaml file laid over its `base:`."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to the file itself")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # PyYAML's errors share no narrow base with OmegaConf's
        raise ConfigError(f"{path} is not valid yaml: {' '.join(str(error).split())}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path} holds no keys")
    tree.pop("made_with", None)  # a run directory's experiment.yaml can be run again
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = _beside(path, base)
    parent = _read(beside if beside.is_file() else find(base), (*seen, path.resolve()))
    parent.pop("name", None)  # a name belongs to the file that says it
    return _laid_over(parent, tree)


def _beside(path: Path, base: str) -> Path:
    """Where a base is looked for first."""
    return path.parent / f"{base}.yaml"


def files(path: Path) -> list[Path]:
    """A yaml file and those of its bases that lie beside it: what reading it needs, but for named ones."""
    base = OmegaConf.select(OmegaConf.load(path), "base")
    beside = _beside(path, base)
    return [path, *(files(beside) if base and beside.is_file() else [])]


def plain_tree(path: Path, overrides: list[str]) -> dict[str, Any]:
    """A yaml file over its base, overridden, as plain containers."""
    return _plain(_with_overrides(_read(path), overrides))


def _laid_over(base: Any, tree: Any) -> Any:
    """`base` with the keys of `tree`, without base's model where `tree` names another: no key would fit it."""
    other = OmegaConf.select(tree, "model.name")
    if other is not None and other != OmegaConf.select(base, "model.name"):
        base.pop("model", None)
    return OmegaConf.merge(base, tree)


def _with_overrides(tree: Any, overrides: list[str]) -> Any:
    bad = [item for item in overrides if "=" not in item or item.startswith("=")]
    if bad:
        raise ConfigError([f"'{item}' is no override; write key=value" for item in bad])
    try:
        return _laid_over(tree, OmegaConf.from_dotlist(overrides))
    except Exception as error:
        raise ConfigError(f"an override cannot be applied: {' '.join(str(error).split())}") from error


# From trees to dataclasses, collecting every fault


def _section(cls: type, values: Any, fallback: Any, where: str, faults: list[str]) -> Any:
    """An instance of the dataclass `cls` from a mapping; what is wrong is added to `faults`.

    A value of a wrong type is replaced by that of `fallback`, so that the others can still be checked; None
    where that does not help.
    """
    types = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        faults.append(f"{where} is {values!r}; it is a section with the keys {', '.join(types)}")
        return None
    faults += [f"{where}.{key} is unknown{suggestion(str(key), types)}" for key in values if key not in types]
    faults += [f"{where}.{name} is missing" for name in types if name not in values]
    typed, complete = OmegaConf.structured(cls), types.keys() <= values.keys()
    with suppress(OmegaConfBaseException):  # all at once is many times faster than one by one
        right = {name: _as_tuple(values[name], types[name]) for name in types if name in values}
        typed = OmegaConf.merge(typed, right)
        return OmegaConf.to_object(typed) if complete else None
    for name in types.keys() & values.keys():
        for value in (values[name], fallback.get(name) if isinstance(fallback, dict) else None):
            try:
                typed = OmegaConf.merge(typed, {name: _as_tuple(value, types[name])})
                break
            except OmegaConfBaseException:
                if value is values[name]:
                    faults.append(f"{where}.{name} is {value!r}; {_expected(types[name], value)} is expected")
        else:
            complete = False
    return OmegaConf.to_object(typed) if complete else None


def section_with_defaults(cls: type, values: Any, where: str, faults: list[str]) -> Any:
    """The same for a dataclass whose keys may be left out; None where what is there is not right."""
    if not isinstance(values, dict):
        return _section(cls, values, None, where, faults)
    defaults = {
        key.name: key.default for key in dataclasses.fields(cls) if key.default is not dataclasses.MISSING
    }
    return _section(cls, defaults | values, defaults, where, faults)


def _as_tuple(value: Any, expected: Any) -> Any:
    """One value stands for a list of one."""
    return [value] if typing.get_origin(expected) is tuple and not isinstance(value, list) else value


def _expected(kind: Any, value: Any = "") -> str:
    """A type in a user's words; `value` is what was given instead."""
    if typing.get_origin(kind) is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return f"one of {', '.join(choices)}{suggestion(str(value), choices)}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {_expected(typing.get_args(kind)[0])}"
    options = typing.get_args(kind)
    if options:
        return " or ".join("null" if option is type(None) else _expected(option) for option in options)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(
        kind, str(kind)
    )


def _sections(tree: dict[str, Any], fallback: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """The sections of an experiment, each an instance, or None where faults leave none."""
    types = typing.get_type_hints(Experiment)
    model = tree.get("model")
    name = model.get("name", "unet") if isinstance(model, dict) else "unet"
    if name in NETWORKS:
        types["model"] = NETWORKS[name].config
    else:
        faults.append(
            f"model.name is '{name}'{suggestion(str(name), NETWORKS)}; known: {', '.join(NETWORKS)}"
        )
        del types["model"]
    inner_keys = {s: typing.get_type_hints(cls) for s, cls in types.items() if dataclasses.is_dataclass(cls)}
    known = [*types, *(f"{section}.{key}" for section, keys in inner_keys.items() for key in keys)]
    for key in tree.keys() - typing.get_type_hints(Experiment).keys():
        inner = [full for full in known if full.endswith(f".{key}")]
        faults.append(f"{key} is unknown{suggestion(inner[0] if inner else str(key), known)}")
    faults += [f"{key} is missing" for key in types if key not in tree]
    return {
        key: _section(types[key], tree[key], fallback.get(key), key, faults)
        for key in inner_keys
        if key in tree
    }


def load_experiment(name: str, overrides: list[str]) -> Experiment:
    """Read, override, check. Raises ConfigError holding every fault, one line each."""
    path = find(name)
    written = _read(path)
    tree = _plain(_with_overrides(written, overrides))
    tree.setdefault("name", path.stem)
    add_neutral_values(tree)
    faults: list[str] = []
    sections = _sections(tree, _plain(written), faults)
    if type(tree.get("seed")) is not int:  # true and false are integers, but no seeds
        faults.append(f"seed is {tree.get('seed')!r}; a whole number is expected")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(tree["name"])):
        faults.append(f"name is {tree['name']!r}; it names a folder: letters, digits, '.', '_' and '-' only")
    for key, section in sections.items():
        if section is not None and key != "model":
            faults += [f"{key}.{inner} {message}" for inner, message in section.problems()]
    if "model" not in sections or None in sections.values() or type(tree.get("seed")) is not int:
        raise ConfigError(faults)
    for section, key in PATHS:
        sections[section] = _absolute(sections[section], key)
    if sections["evaluate"].reference_file is not None:
        sections["evaluate"] = _absolute(sections["evaluate"], "reference")
    experiment = Experiment(name=str(tree["name"]), seed=tree["seed"], **sections)
    faults += [f"{key} {message}" for key, message in experiment.problems()]
    if faults:
        raise ConfigError(faults)
    return experiment


def _absolute(section: Any, key: str) -> Any:
    """The section with a path that means the same in every process: workers have other working folders."""
    path = getattr(section, key)
    return dataclasses.replace(section, **{key: str(Path(path).expanduser().absolute())}) if path else section


def relative_paths(name: str, overrides: list[str]) -> list[str]:
    """The paths of a valid experiment that depend on the folder or the person, as 'data.path=images'."""
    tree = _plain(_with_overrides(_read(find(name)), overrides))
    paths = {f"{section}.{key}": tree[section][key] for section, key in PATHS}
    if tree["evaluate"]["reference"] not in SPLITS:
        paths["evaluate.reference"] = tree["evaluate"]["reference"]
    return [f"{key}={path}" for key, path in paths.items() if path and not str(path).startswith("/")]


def made_with(path: Path) -> dict[str, Any]:
    """What a run directory's experiment.yaml says of how it was made: commit, versions, data key."""
    return _plain(OmegaConf.load(path))["made_with"]


def load_cluster(name: str, overrides: list[str]) -> ClusterConfig:
    """The same for conf/cluster/; `overrides` without their `cluster.`."""
    tree = _plain(_with_overrides(_read(find(name, "cluster")), overrides))
    faults: list[str] = []
    cluster = _section(ClusterConfig, tree, None, "cluster", faults)
    if cluster is not None:
        faults += [f"cluster.{key} {message}" for key, message in cluster.problems()]
    if faults:
        raise ConfigError(faults)
    return cluster


def to_dict(section: Any) -> dict[str, Any]:
    """A dataclass as plain containers, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(section)))


def to_yaml(section: Any, **more: Any) -> str:
    """A dataclass as yaml, with `more` top-level keys after its own."""
    return OmegaConf.to_yaml(OmegaConf.create({**to_dict(section), **more}))
