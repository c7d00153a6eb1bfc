"""Experiment (whatever may change a number) and Cluster (where it runs; it must not change one)."""

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
from pipeline.config.load import load_cluster, load_experiment, made_with, to_dict, to_yaml
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
    suggestion,
    weights_kind,
)
from pipeline.config.variants import beside, candidate, chosen

__all__ = [
    "SPLITS",
    "ClusterConfig",
    "DataConfig",
    "EvaluateConfig",
    "Experiment",
    "FiguresConfig",
    "PublishedConfig",
    "SampleConfig",
    "beside",
    "candidate",
    "checkpoint_rule",
    "checkpoint_step",
    "chosen",
    "data_key",
    "evaluate_key",
    "figures_key",
    "hash_of",
    "load_cluster",
    "load_experiment",
    "made_with",
    "run_content",
    "run_key",
    "sample_key",
    "selection_key",
    "suggestion",
    "to_dict",
    "to_yaml",
    "weights_kind",
]
