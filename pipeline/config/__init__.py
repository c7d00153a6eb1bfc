"""Experiment (whatever may change a number) and Cluster (where it runs; it must not change one)."""

from pipeline.config.checkpoints import candidate, checkpoint_rule, checkpoint_step, choose, weights_kind
from pipeline.config.checks import field_types, is_section, suggestion
from pipeline.config.files import conf_folders, files, find, made_with, names_in_conf
from pipeline.config.load import flatten, load_cluster, load_experiment, relative_paths, to_dict, to_yaml
from pipeline.config.sections import (
    SPLITS,
    ClusterConfig,
    DataConfig,
    EvaluateConfig,
    Experiment,
    FiguresConfig,
    PublishedConfig,
    SampleConfig,
    check_workers,
)

__all__ = [
    "SPLITS",
    "ClusterConfig",
    "DataConfig",
    "EvaluateConfig",
    "Experiment",
    "FiguresConfig",
    "PublishedConfig",
    "SampleConfig",
    "candidate",
    "check_workers",
    "checkpoint_rule",
    "checkpoint_step",
    "choose",
    "conf_folders",
    "field_types",
    "files",
    "find",
    "flatten",
    "is_section",
    "load_cluster",
    "load_experiment",
    "made_with",
    "names_in_conf",
    "relative_paths",
    "suggestion",
    "to_dict",
    "to_yaml",
    "weights_kind",
]
