"""Experiment (whatever may change a number) and Cluster (where it runs; it must not change one)."""

from pipeline.config.checks import suggestion
from pipeline.config.load import (
    conf_folders,
    files,
    load_cluster,
    load_experiment,
    made_with,
    relative_paths,
    to_dict,
    to_yaml,
)
from pipeline.config.sections import (
    SPLITS,
    ClusterConfig,
    DataConfig,
    EvaluateConfig,
    Experiment,
    FiguresConfig,
    PublishedConfig,
    SampleConfig,
    checkpoint_rule,
    checkpoint_step,
    weights_kind,
)
from pipeline.config.variants import candidate, chosen

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
    "checkpoint_rule",
    "checkpoint_step",
    "chosen",
    "conf_folders",
    "files",
    "load_cluster",
    "load_experiment",
    "made_with",
    "relative_paths",
    "suggestion",
    "to_dict",
    "to_yaml",
    "weights_kind",
]
