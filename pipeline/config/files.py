"""Yaml files of configurations: finding them, reading them with their `base:`, applying overrides.

Nothing in a value is filled in: OmegaConf's interpolations stay the text that they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from omegaconf import DictConfig, OmegaConf

from pipeline.config.checks import Tree, flatten
from pipeline.errors import ConfigError, suggest

Folder = Literal["", "cluster", "sweep"]  # below conf/; experiments stand in conf/ itself


def list_conf_folders() -> list[Path]:
    """Return the folders that are searched: ./conf, then the conf/ that came with the program."""
    package = Path(__file__).parent.parent
    return [Path.cwd() / "conf", package / "conf", package.parent / "conf"]


def list_configurations(folder: Folder = "") -> list[str]:
    """Return the names of the configurations in a folder of conf/, sorted."""
    return sorted({file.stem for conf in list_conf_folders() for file in (conf / folder).glob("*.yaml")})


def find_configuration(name: str, folder: Folder = "") -> Path:
    """Return the file that `name` (a path, or a name in conf/) means."""
    if Path(name).suffix in (".yaml", ".yml"):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"{name} does not exist; give the path of a yaml file, or a name in conf/{folder}")
    for conf in list_conf_folders():
        if (conf / folder / f"{name}.yaml").is_file():
            return conf / folder / f"{name}.yaml"
    known = list_configurations(folder)
    raise ConfigError(
        f"no {folder or 'experiment'} is named '{name}'{suggest(name, known)}; known: {', '.join(known)}"
    )


def read_configuration(path: Path, seen: tuple[Path, ...] = ()) -> Tree:
    """Read a yaml file and merge it into its base."""
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


def list_base_files(path: Path) -> list[Path]:
    """Return a yaml file and those of its bases that lie in the same folder."""
    near = path.parent / f"{_read_yaml(path).get('base')}.yaml"
    return [path, *(list_base_files(near) if near.is_file() else [])]


def read_provenance(path: Path) -> Tree:
    """Read the provenance in a run directory's experiment.yaml: commit, versions, data key."""
    return _read_yaml(path).get("made_with") or {}


def apply_overrides(tree: Tree, overrides: list[str]) -> Tree:
    """Return the tree with the key=value overrides applied."""
    bad = [word for word in overrides if "=" not in word or word.startswith("=")]
    if bad:
        raise ConfigError([f"'{word}' is no override; write key=value" for word in bad])
    try:
        return _merge(tree, _to_tree(OmegaConf.from_dotlist(overrides)))
    except Exception as error:
        raise ConfigError(f"an override cannot be applied: {' '.join(str(error).split())}") from error


def _read_yaml(path: Path) -> Tree:
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # PyYAML's errors share no narrow base with OmegaConf's
        raise ConfigError(f"{path} is not valid yaml: {' '.join(str(error).split())}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path} holds no keys")
    return _to_tree(tree)


def _merge(base: Tree, tree: Tree) -> Tree:
    """Merge `tree` into `base`; drop base's model section where `tree` names another network."""
    before, after = (flatten(below).get("model.name") for below in (base, tree))
    if after not in (None, before):
        base = {key: value for key, value in base.items() if key != "model"}
    return _to_tree(cast(DictConfig, OmegaConf.merge(base, tree)))


def _to_tree(tree: DictConfig) -> Tree:
    return cast(Tree, OmegaConf.to_container(tree, resolve=False))
