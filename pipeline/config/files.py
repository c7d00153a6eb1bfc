"""Finding configurations and reading them as plain trees: yaml, laid over its `base:`, with overrides on top.

Nothing in a value is filled in: OmegaConf's interpolations stay the text that they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from omegaconf import DictConfig, OmegaConf

from pipeline.config.checks import Tree, flatten
from pipeline.errors import ConfigError, suggest

Kind = Literal["", "cluster", "sweep"]


def list_conf_folders() -> list[Path]:
    """Return where names are looked up: ./conf, then the conf/ that came with the program."""
    package = Path(__file__).parent.parent
    return [Path.cwd() / "conf", package / "conf", package.parent / "conf"]


def list_configurations(kind: Kind = "") -> list[str]:
    """Return the names of the configurations of a kind, sorted."""
    return sorted({file.stem for folder in list_conf_folders() for file in (folder / kind).glob("*.yaml")})


def find_configuration(name: str, kind: Kind = "") -> Path:
    """Return the file that `name` (a path, or a name in conf/) means."""
    if Path(name).suffix in (".yaml", ".yml"):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"{name} does not exist; give the path of a yaml file, or a name in conf/{kind}")
    for folder in list_conf_folders():
        if (folder / kind / f"{name}.yaml").is_file():
            return folder / kind / f"{name}.yaml"
    known = list_configurations(kind)
    raise ConfigError(
        f"no {kind or 'experiment'} is named '{name}'{suggest(name, known)}; known: {', '.join(known)}"
    )


def read_configuration(path: Path, seen: tuple[Path, ...] = ()) -> Tree:
    """Read a yaml file over its base."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to the file itself")
    tree = _read_yaml(path)
    tree.pop("made_with", None)  # a run directory's experiment.yaml can be run again
    base = tree.pop("base", None)
    if base is None:
        return tree
    near = path.parent / f"{base}.yaml"
    below = read_configuration(near if near.is_file() else find_configuration(base), (*seen, path.resolve()))
    below.pop("name", None)  # a name belongs to the file that says it
    return _merge(below, tree)


def _read_yaml(path: Path) -> Tree:
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # PyYAML's errors share no narrow base with OmegaConf's
        raise ConfigError(f"{path} is not valid yaml: {' '.join(str(error).split())}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path} holds no keys")
    return _plain(tree)


def _plain(tree: DictConfig) -> Tree:
    return cast(Tree, OmegaConf.to_container(tree, resolve=False))


def list_base_files(path: Path) -> list[Path]:
    """Return a yaml file and those of its bases that lie in its folder: what reading it needs, but for named ones."""
    near = path.parent / f"{_read_yaml(path).get('base')}.yaml"
    return [path, *(list_base_files(near) if near.is_file() else [])]


def _merge(base: Tree, tree: Tree) -> Tree:
    """Lay the keys of `tree` over `base`, without base's model where `tree` names another: no key would fit it."""
    before, after = (flatten(below).get("model.name") for below in (base, tree))
    if after not in (None, before):
        base = {key: value for key, value in base.items() if key != "model"}
    return _plain(cast(DictConfig, OmegaConf.merge(base, tree)))


def apply_overrides(tree: Tree, overrides: list[str]) -> Tree:
    """Lay key=value over a tree."""
    bad = [word for word in overrides if "=" not in word or word.startswith("=")]
    if bad:
        raise ConfigError([f"'{word}' is no override; write key=value" for word in bad])
    try:
        return _merge(tree, _plain(OmegaConf.from_dotlist(overrides)))
    except Exception as error:
        raise ConfigError(f"an override cannot be applied: {' '.join(str(error).split())}") from error


def read_provenance(path: Path) -> Tree:
    """Read what a run directory's experiment.yaml says of how it was made: commit, versions, data key."""
    return _read_yaml(path).get("made_with") or {}
