"""Completion of the command line by the shell: `eval "$(register-python-argcomplete ddpm)"` turns it on.

Only a shell that asks for completion imports this module.
"""

from __future__ import annotations

import os
from argparse import Action, ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

import argcomplete

from ddpm.networks import NETWORKS
from pipeline.config import (
    ClusterConfig,
    Experiment,
    get_field_types,
    is_section,
    list_configurations,
    load_cluster,
)
from pipeline.store.run import find_runs


def complete(program: ArgumentParser, parsers: Mapping[str, ArgumentParser]) -> None:
    """Answer the shell and end the process. The metavar of an argument tells how it is completed."""
    actions = [action for parser in parsers.values() for action in parser._actions]
    for action in actions:
        if action.metavar in LISTERS:
            action.completer = _list_words  # type: ignore[attr-defined]
    valued = {name for action in actions if action.nargs is None for name in action.option_strings}
    line = os.environ["COMP_LINE"].encode()[: int(os.environ["COMP_POINT"])].decode()
    line = hide_options(line, valued)
    os.environ["COMP_LINE"], os.environ["COMP_POINT"] = line, str(len(line.encode()))
    argcomplete.autocomplete(program)


def hide_options(line: str, valued: set[str]) -> str:
    """Take finished options out of a line that is being typed: argparse would end the list of words at them.

    `valued` are the options that take a value. After `submit --` the line is that of the job.
    """
    program, *done, typed = line.split(" ")
    if done[:1] == ["submit"] and "--" in done:
        done = done[done.index("--") + 1 :]
    before = ["", *done]
    kept = [
        word
        for last, word in zip(before, done, strict=False)
        if not word.startswith("-") and last not in valued
    ]
    if before[-1] in valued:  # its value is being typed
        kept.append(before[-1])
    return " ".join([program, *kept, typed])


def _list_words(prefix: str, action: Action, **_: object) -> list[str]:
    return LISTERS[str(action.metavar)](prefix)


def _list_cluster_keys(prefix: str) -> list[str]:
    return _list_section("cluster", ClusterConfig, prefix)


def _list_keys(prefix: str) -> list[str]:
    """List key=value: the keys of an experiment and of a cluster; after "=", the values where they can be listed."""
    sections = [(key, kind) for key, kind in get_field_types(Experiment).items() if is_section(kind)]
    sections += [("model", config) for config in NETWORKS.values()]
    found = [word for name, kind in sections for word in _list_section(name, kind, prefix)]
    return [*dict.fromkeys(found), "seed=", "name=", *_list_cluster_keys(prefix)]


def _list_section(name: str, section: type, prefix: str) -> list[str]:
    words = []
    for key, kind in get_field_types(section).items():
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


def _list_runs() -> list[str]:
    """List the runs of the local cluster's storage root."""
    return [path.name for path in find_runs(Path(load_cluster("local", []).storage))]


# From the metavar of an argument and what is typed of a word to the words that it may become.
LISTERS: dict[str, Callable[[str], list[str]]] = {
    "CLUSTER": lambda prefix: list_configurations("cluster"),
    "cluster.key=value": _list_cluster_keys,
    "key=value": _list_keys,
    "EXPERIMENT | key=value": lambda prefix: [*list_configurations(), *_list_keys(prefix)],
    "SWEEP | key=value": lambda prefix: [*list_configurations("sweep"), *_list_keys(prefix)],
    "RUN": lambda prefix: [*_list_runs(), *_list_cluster_keys(prefix)],
}
