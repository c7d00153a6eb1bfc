"""Parses the arguments of a command: a name, overrides, and the cluster."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import ClusterConfig, Experiment


def list_non_cluster_arguments(options: Namespace) -> list[str]:
    return [word for word in options.words if not word.startswith("cluster.")]


def split_arguments(options: Namespace, kind: str) -> tuple[str | None, list[str]]:
    words = list_non_cluster_arguments(options)
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise ConfigError(f"one {kind} at a time, not {' and '.join(names)}; overrides are written key=value")
    return (names[0] if names else None), [word for word in words if "=" in word]


def load_cluster(options: Namespace, alone: bool = False) -> ClusterConfig:
    """Load the cluster of the command; `alone`: the command takes no arguments but the cluster's."""
    from pipeline import config

    if alone and (stray := list_non_cluster_arguments(options)):
        raise ConfigError(f"'{stray[0]}' is no argument of this command; it takes cluster.key=value only")
    own = [word.removeprefix("cluster.") for word in options.words if word.startswith("cluster.")]
    return config.load_cluster(options.cluster, own)


def prepare_root(options: Namespace, alone: bool = True) -> Path:
    from pipeline.engine.find import prepare_storage_root

    return prepare_storage_root(load_cluster(options, alone))


def load_experiment_and_cluster(options: Namespace) -> tuple[Experiment, ClusterConfig]:
    """Load experiment and cluster; report the problems of both at once."""
    from pipeline import config
    from pipeline.engine.names import list_known_names

    name, overrides = split_arguments(options, "experiment")
    problems: list[str] = []
    try:
        name, known = name or options.command.default, list_known_names()
        experiment = config.load_experiment(name, overrides, known)
        if experiment.published.path:  # typed overrides replace the published settings
            from pipeline.store.diffusers_layout import derive_overrides

            derived = derive_overrides(experiment.published)
            experiment = config.load_experiment(name, [*derived, *overrides], known)
    except ConfigError as error:
        problems += error.problems
    try:
        cluster = load_cluster(options)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return experiment, cluster
