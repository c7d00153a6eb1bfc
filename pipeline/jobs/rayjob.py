"""A command as a RayJob of KubeRay: a cluster of its own, which ends with the command. A queue may delay its start."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import yaml

from pipeline import config
from pipeline.compute.resources import count_fitting_workers, resolve_resources
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

    words, relative: as in `submit_job`; template: a RayJob; labels: Kueue's (queue-name, ..). Raises PipelineError.
    """
    check_paths(relative, cluster)
    here, *shipped = (folder.resolve() for folder in config.list_conf_folders())
    kinds = config.FOLDERS if here not in shipped else ()
    named = {file.stem for kind in kinds for file in (here / kind).glob("*.yaml")}
    for word in words:
        if word in named or word.endswith((".yaml", ".yml")):
            raise ConfigError(f"{word} is a configuration of this folder; the job has those of its image")
    try:
        job: Tree = yaml.safe_load(require_regular_file(template).read_text())
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        pod = group["template"]["spec"]["containers"][0]["resources"]
        limits = pod.get("requests", {}) | pod["limits"]
        cpus, gpus = int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{template} is no RayJob with one group of workers and its limits") from error
    per_worker = float(gpus > 0) if cluster.gpus_per_worker is None else cluster.gpus_per_worker
    own = cluster.cpus_per_worker or (1 if gpus else cpus)  # without GPUs, a worker has a machine
    nodes = math.ceil((cluster.workers or 1) / max(1, count_fitting_workers([(cpus, gpus)], own, per_worker)))
    resolve_resources(cluster, [(cpus, gpus)] * nodes)  # the job would wait for machines that never come
    group |= {"replicas": nodes, "minReplicas": nodes, "maxReplicas": nodes}
    queue_labels = {f"kueue.x-k8s.io/{name}": value for name, value in labels.items() if value}
    job["metadata"] = {"generateName": f"ddpm-{words[0]}-", "labels": queue_labels}
    job["spec"] |= {"entrypoint": shlex.join(["ddpm", *words]), "backoffLimit": 0}
    job["spec"]["runtimeEnvYAML"] = json.dumps({"env_vars": {USER_VARIABLE: name_user()}})
    if hours:
        job["spec"]["activeDeadlineSeconds"] = hours * 3600
    return json.dumps(job, indent=1)
