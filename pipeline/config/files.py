"""Yaml files of configurations: how they are found, read with their `base:`, and overridden.

Every value stays the text in the file, until `checks` converts it to the type of its key. No default is added.
"""

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf

from pipeline.config.checks import Kind, Tree, find_type, flatten, takes_text
from pipeline.errors import ConfigError, suggest

Folder = Literal["", "sweep", "cluster"]  # below conf/; experiments are in conf/ itself
FOLDERS: tuple[Folder, ...] = get_args(Folder)

QUOTED = r"""'([^']|'')*'|"([^"\\]|\\.)*\""""
LARGEST = 2**20  # bytes of a configuration
TAGS = [f"tag:yaml.org,2002:{name}" for name in ("null", "str", "seq", "map")]


class TextLoader(yaml.SafeLoader):
    """Yaml loader that keeps all values except null as texts; it refuses aliases, tags and duplicate keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if pair[0] == TAGS[0]]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (*TAGS, None)}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; `base:` takes over the keys of another file")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if len(set(map(str, names))) < len(names):
            raise yaml.YAMLError(f"a key is written twice among {', '.join(map(str, names))}")
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


def list_conf_folders() -> list[Path]:
    """Return the folders to search: ./conf, then the conf/ of the program."""
    package = Path(__file__).parent.parent
    return [Path.cwd() / "conf", package / "conf", package.parent / "conf"]


def list_configurations(folder: Folder = "") -> list[str]:
    files = (file for conf in list_conf_folders() for file in (conf / folder).glob("*.yaml"))
    return sorted({file.stem for file in files if file.is_file()})


def find_configuration(name: str, folder: Folder = "") -> Path:
    """Return the file that `name` (a path, or a name in conf/) means."""
    if Path(name).suffix in (".yaml", ".yml"):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"{name} does not exist; give the path of a yaml file, or a name in conf/{folder}")
    for conf in list_conf_folders():
        if (conf / folder / f"{name}.yaml").is_file():
            return conf / folder / f"{name}.yaml"
    hint = suggest(name, list_configurations(folder))
    raise ConfigError(f"no {folder or 'experiment'} is named '{name}'{hint}; `ddpm list` has all names")


def read_configuration(path: Path, folder: Folder = "", seen: tuple[Path, ...] = ()) -> Tree:
    """Read a yaml file and merge it into its base, a file of the same folder or of a folder of conf/."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to the file itself")
    tree = _read_yaml(path)
    tree.pop("made_with", None)  # so that experiment.yaml of a run directory is a configuration too
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is {base}; the name of one configuration is expected")
    near = path.parent / f"{base}.yaml"
    file = near if near.is_file() else find_configuration(base, folder)
    below = read_configuration(file, folder, (*seen, path.resolve()))
    below.pop("name", None)  # an experiment's name is never inherited
    return _merge(below, tree)


def list_base_files(path: Path) -> list[Path]:
    """Return a yaml file and those of its bases that lie in the same folder."""
    near = path.parent / f"{_read_yaml(path).get('base')}.yaml"
    return [path, *(list_base_files(near) if near.is_file() else [])]


def read_provenance(path: Path) -> Tree:
    """Read the provenance in a run directory's experiment.yaml: commit, versions, data key, as texts."""
    made_with = _read_yaml(path).get("made_with")
    return made_with if isinstance(made_with, dict) else {}


def apply_overrides(tree: Tree, overrides: list[str], section: type) -> Tree:
    """Return the tree with key=value overrides. section: the class of the keys; a key may take any text as typed."""
    given: list[Tree] = []
    problems = []
    for word in overrides:
        key, equals, text = word.partition("=")
        try:
            value = _read_override(find_type(section, key), text)
        except ConfigError as error:
            problems.append(f"{key} is '{text}': {error}")
            continue
        if not (key and equals):
            problems.append(f"'{word}' is not an override; write key=value")
        for name in reversed(key.split(".")):
            value = {name: value}
        given.append(value)
    if problems:
        raise ConfigError(problems)
    return _merge(tree, _merge_trees({}, *given))


def _read_override(kind: Kind | None, text: str) -> Any:
    """Return the value of an override; if its type is text, the text as typed unless it is null or quoted."""
    if not text.strip() or (takes_text(kind) and not re.fullmatch(QUOTED, text, re.DOTALL)):
        return None if text == "null" and NoneType in get_args(kind) else text
    return _load_yaml(text)


def _read_yaml(path: Path) -> Tree:
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise ConfigError(f"{path} is no configuration: it is no file, or larger than {LARGEST:,} bytes")
    try:
        tree = deepcopy(_load_file(path.read_bytes()))
    except ConfigError as error:
        raise ConfigError(f"{path} is not valid yaml: {error}") from error
    if not isinstance(tree, dict | NoneType):
        raise ConfigError(f"{path} holds no keys")
    return tree or {}


@lru_cache(maxsize=32)
def _load_file(content: bytes) -> Any:
    """Parse the content of a file, once: every point of a sweep reads the same files, and yaml is slow."""
    return _load_yaml(content)


def _load_yaml(text: str | bytes) -> Any:
    """Parse yaml text. Raises ConfigError with the reason alone, in one line."""
    try:
        return yaml.load(text, TextLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            raise ConfigError(f"{error.problem} (line {error.problem_mark.line + 1})") from error
        raise ConfigError(" ".join(str(error).split())) from error


def _merge(base: Tree, tree: Tree) -> Tree:
    """Merge `tree` into `base`; drop base's model section if `tree` names another network."""
    before, after = (flatten(below).get("model.name") for below in (base, tree))
    if isinstance(after, str) and after != before:
        base = {key: value for key, value in base.items() if key != "model"}
    return _merge_trees(base, tree)


def _merge_trees(*trees: Tree) -> Tree:
    """Merge by OmegaConf. It gets texts as bytes, so that `${` and `???` in them mean nothing."""
    try:
        merged = OmegaConf.merge(*map(_swap_texts, trees))
    except TypeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"one key has a list and a section ({reason})") from error
    return _swap_texts(OmegaConf.to_container(merged))


def _swap_texts(value: Any) -> Any:
    """Return a tree with its texts as bytes, and its bytes as texts."""
    if isinstance(value, dict):
        return {key: _swap_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_swap_texts(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    return value.decode(errors="surrogatepass") if isinstance(value, bytes) else value
