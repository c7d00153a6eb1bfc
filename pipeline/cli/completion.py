"""Completion of the command line by the shell: `eval "$(register-python-argcomplete ddpm)"` turns it on.

Only a shell that asks for completion imports this module.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

import argcomplete

from ddpm.networks import NETWORKS
from pipeline import config
from pipeline.store.run import find_runs


def complete(program: ArgumentParser, parsers: Mapping[str, ArgumentParser]) -> None:
    """Print the completions of the line and exit; the metavar of an argument selects their list."""
    actions = [action for parser in parsers.values() for action in parser._actions]
    for action in actions:
        if action.metavar in COMPLETERS:
            complete_word = COMPLETERS[str(action.metavar)]
            action.completer = lambda prefix, own=complete_word, **_: own(prefix)  # type: ignore[attr-defined]
    valued = {name for action in actions if action.nargs is None for name in action.option_strings}
    line = os.environ["COMP_LINE"].encode()[: int(os.environ["COMP_POINT"])].decode()
    line = remove_options(line, valued)
    os.environ["COMP_LINE"], os.environ["COMP_POINT"] = line, str(len(line.encode()))
    argcomplete.autocomplete(program)


def remove_options(line: str, valued: set[str]) -> str:
    """Remove complete options from the typed line, since argparse would not complete names behind them.

    valued: the options that take a value. After `submit --` the line is that of the job.
    """
    program, *done, typed = line.split(" ")
    if done[:1] == ["submit"] and "--" in done:
        done = done[done.index("--") + 1 :]
    pairs = zip(["", *done], done, strict=False)
    kept = [word for before, word in pairs if not word.startswith("-") and before not in valued]
    if done and done[-1] in valued:  # its value is being typed
        kept.append(done[-1])
    return " ".join([program, *kept, typed])


def _complete_cluster_keys(prefix: str) -> list[str]:
    return _complete_section("cluster", config.ClusterConfig, prefix)


def _complete_keys(prefix: str) -> list[str]:
    """Return key= for the keys of an experiment and of a cluster; after "=" the values, if the key has a list."""
    sections: list[tuple[str, type]] = [("model", network) for network in NETWORKS.values()]
    fields = config.get_field_types(config.Experiment)
    sections += [(key, kind) for key, kind in fields.items() if config.is_section(kind)]
    found = [word for name, kind in sections for word in _complete_section(name, kind, prefix)]
    return [*dict.fromkeys(found), "seed=", "name=", *_complete_cluster_keys(prefix)]


def _complete_section(name: str, section: type, prefix: str) -> list[str]:
    words = []
    for key, kind in config.get_field_types(section).items():
        word = f"{name}.{key}="
        values = _complete_value(kind) if prefix.startswith(word) else []
        words += [f"{word}{value}" for value in values] or [word]
    return words


def _complete_value(kind: object) -> list[str]:
    """Return the values in a field's type: its choices, true and false, null."""
    if kind is bool:
        return ["true", "false"]
    if kind is type(None):
        return ["null"]
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [value for option in get_args(kind) for value in _complete_value(option)]


def _complete_run(prefix: str) -> list[str]:
    """Return the runs of the local cluster's storage root, and the keys of a cluster."""
    runs = find_runs(Path(config.load_cluster("local", []).storage))
    return [*(path.name for path in runs), *_complete_cluster_keys(prefix)]


# metavar of an argument -> function from the start of a word to its completions
COMPLETERS: dict[str, Callable[[str], list[str]]] = {
    "CLUSTER": lambda prefix: config.list_configurations("cluster"),
    "cluster.key=value": _complete_cluster_keys,
    "key=value": _complete_keys,
    "EXPERIMENT | key=value": lambda prefix: [*config.list_configurations(), *_complete_keys(prefix)],
    "SWEEP | key=value": lambda prefix: [*config.list_configurations("sweep"), *_complete_keys(prefix)],
    "RUN": _complete_run,
}
