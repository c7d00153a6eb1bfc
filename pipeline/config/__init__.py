"""Experiment (whatever may change a number) and Cluster (where it runs; it must not change one)."""

from pipeline.config.checkpoints import candidate, checkpoint_rule, checkpoint_step, choose, weights_kind
from pipeline.config.checks import field_types, flatten, is_section
from pipeline.config.files import conf_folders, files, find, made_with, names_in_conf
from pipeline.config.load import load_cluster, load_experiment, relative_paths, to_dict, to_yaml
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
