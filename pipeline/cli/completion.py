"""Completion of the command line by the shell: `eval "$(register-python-argcomplete ddpm)"` turns it on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

VALUED = {"--cluster", "--metric", "--weights", "--step", "--port", "--address", "--id", "--budget"}

Completer = Callable[[str], list[str]]  # from what is typed of a word to the words that it may become


def attach(action: argparse.Action, complete: Completer) -> None:
    """Tell argcomplete how a word or the value of an option is completed."""
    action.completer = lambda prefix, **_: complete(prefix)  # type: ignore[attr-defined]


def complete(program: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process."""
    import argcomplete

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    line = hide_options(line.encode()[:point].decode())
    os.environ["COMP_LINE"], os.environ["COMP_POINT"] = line, str(len(line.encode()))
    argcomplete.autocomplete(program)


def hide_options(line: str) -> str:
    """Take finished options out of a line that is being typed: argparse would end the list of words at them.

    After `submit --` the line is that of the job.
    """
    program, *words = line.split(" ")
    if words[:1] == ["submit"] and "--" in words[:-1]:
        words = words[words.index("--") + 1 :]
    kept = []
    while len(words) > 1:
        word = words.pop(0)
        if not word.startswith("-"):
            kept.append(word)
        elif word in VALUED:
            if len(words) == 1:  # its value is being typed
                kept.append(word)
            else:
                words.pop(0)
    return " ".join([program, *kept, *words])


def list_clusters(prefix: str) -> list[str]:
    from pipeline.config import names_in_conf

    return names_in_conf("cluster")


def list_experiment_words(prefix: str) -> list[str]:
    from pipeline.config import names_in_conf

    return [*names_in_conf(), *list_keys(prefix)]


def list_sweep_words(prefix: str) -> list[str]:
    from pipeline.config import names_in_conf

    return [*names_in_conf("sweep"), *list_keys(prefix)]


def list_runs(prefix: str) -> list[str]:
    """List the runs of the local cluster's storage root."""
    from pipeline.config import load_cluster
    from pipeline.store.run import find_runs

    names = [path.name for path in find_runs(Path(load_cluster("local", []).storage))]
    return [*names, *list_cluster_keys(prefix)]


def list_cluster_keys(prefix: str) -> list[str]:
    from pipeline.config import ClusterConfig

    return _list_section("cluster", ClusterConfig, prefix)


def list_keys(prefix: str) -> list[str]:
    """List key=value: the keys of an experiment and of a cluster; after "=", the values where they can be listed."""
    from ddpm.networks import NETWORKS
    from pipeline.config import Experiment, field_types, is_section

    types = field_types(Experiment)
    sections: list[tuple[str, type]] = [(key, types[key]) for key in types if is_section(types[key])]
    sections += [("model", entry.config) for entry in NETWORKS.values()]
    found = [word for name, kind in sections for word in _list_section(name, kind, prefix)]
    return [*dict.fromkeys(found), "seed=", "name=", *list_cluster_keys(prefix)]


def _list_section(name: str, section: type, prefix: str) -> list[str]:
    from pipeline.config import field_types

    words = []
    for key, kind in field_types(section).items():
        word = f"{name}.{key}="
        values = _list_values(kind) if prefix.startswith(word) else []
        words += [f"{word}{value}" for value in values] or [word]
    return words


def _list_values(kind: object) -> list[str]:
    """List the values that a type names: of a choice, of true or false, null."""
    if kind is bool:
        return ["true", "false"]
    if kind is type(None):
        return ["null"]
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [value for option in get_args(kind) for value in _list_values(option)]
