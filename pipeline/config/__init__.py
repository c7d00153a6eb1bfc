"""The configuration: the experiment, which may change a number, and the cluster, which must not."""

from pipeline.config.checks import flatten, get_field_types, is_section, to_dict
from pipeline.config.experiment import Experiment
from pipeline.config.files import (
    FOLDERS,
    find_configuration,
    list_base_files,
    list_conf_folders,
    list_configurations,
    read_provenance,
)
from pipeline.config.load import find_relative_paths, load_cluster, load_experiment, read_value, to_yaml
from pipeline.config.sections import ClusterConfig, DataConfig, PublishedConfig, require_images_for_workers
