"""Experiment (whatever may change a number) and Cluster (where it runs; it must not change one)."""

from pipeline.config.checks import suggestion
from pipeline.config.keys import (
    data_key,
    evaluate_key,
    figures_key,
    hash_of,
    run_content,
    run_key,
    sample_key,
    selection_key,
)
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
from pipeline.config.points import Point, points, relative_paths_of_sweep
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
from pipeline.config.sweep import LOSS, Sweep, load_sweep
from pipeline.config.variants import beside, candidate, chosen

__all__ = [
    "LOSS",
    "SPLITS",
    "ClusterConfig",
    "DataConfig",
    "EvaluateConfig",
    "Experiment",
    "FiguresConfig",
    "Point",
    "PublishedConfig",
    "SampleConfig",
    "Sweep",
    "beside",
    "candidate",
    "checkpoint_rule",
    "checkpoint_step",
    "chosen",
    "conf_folders",
    "data_key",
    "evaluate_key",
    "figures_key",
    "files",
    "hash_of",
    "load_cluster",
    "load_experiment",
    "load_sweep",
    "made_with",
    "points",
    "relative_paths",
    "relative_paths_of_sweep",
    "run_content",
    "run_key",
    "sample_key",
    "selection_key",
    "suggestion",
    "to_dict",
    "to_yaml",
    "weights_kind",
]
