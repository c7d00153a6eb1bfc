"""A command as a RayJob of KubeRay: its own cluster, which a queue can hold back, and which ends with the command."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import yaml

from pipeline import config
from pipeline.config import ClusterConfig
from pipeline.config.checks import Tree
from pipeline.errors import ConfigError
from pipeline.jobs.package import check_paths
from pipeline.store.files import USER_VARIABLE, name_user, require_regular_file


def make_rayjob(
    words: list[str], cluster: ClusterConfig, relative: list[str], template: Path, labels: dict[str, str | None],
    hours: int | None,
) -> str:  # fmt: skip
    """Return the manifest of a RayJob that runs a command that was checked, for `kubectl create --filename -`.

    words, relative: as in `submit_job`; template: a RayJob; labels: Kueue's, as {"queue-name": ..}. Raises ConfigError.
    """
    check_paths(relative, cluster)
    here, *shipped = (folder.resolve() for folder in config.list_conf_folders())
    kinds = config.FOLDERS if here not in shipped else ()
    own = {file.stem for kind in kinds for file in (here / kind).glob("*.yaml")}
    for word in words:
        if word in own or word.endswith((".yaml", ".yml")):
            raise ConfigError(f"{word} is a configuration of this folder; the job has those of its image")
    try:
        job: Tree = yaml.safe_load(require_regular_file(template).read_text())
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{template} is no RayJob with one group of workers and limits") from error
    gpus = float(limits.get("nvidia.com/gpu", 0))
    wanted = (cluster.workers or 1) * (1.0 if cluster.gpus_per_worker is None else cluster.gpus_per_worker)
    nodes = math.ceil(wanted / gpus) if gpus else cluster.workers or 1
    group |= {"replicas": nodes, "minReplicas": nodes, "maxReplicas": nodes}
    queue_labels = {f"kueue.x-k8s.io/{name}": value for name, value in labels.items() if value}
    job["metadata"] = {"generateName": f"ddpm-{words[0]}-", "labels": queue_labels}
    job["spec"] |= {"entrypoint": shlex.join(["ddpm", *words]), "backoffLimit": 0}
    job["spec"]["runtimeEnvYAML"] = json.dumps({"env_vars": {USER_VARIABLE: name_user()}})
    if hours:
        job["spec"]["activeDeadlineSeconds"] = hours * 3600
    return json.dumps(job, indent=1)
