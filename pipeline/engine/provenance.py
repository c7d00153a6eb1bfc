"""The provenance of a run: code, versions, hardware; and the check that the same code has made it so far."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from pipeline import config
from pipeline.compute.resources import list_gpu_names
from pipeline.config import Experiment
from pipeline.config.checks import Tree
from pipeline.engine.code import find_commit, find_version, hash_code, hash_patch, read_commit
from pipeline.errors import PipelineError, hide_password
from pipeline.stages.stage import Stage
from pipeline.store import keys
from pipeline.store.files import name_user, write_text
from pipeline.store.run import Place

PACKAGES = ("torch", "ray", "mlflow", "webdataset", "torch-fidelity", "omegaconf", "numpy")


def find_package_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def collect_provenance(experiment: Experiment) -> Tree:
    """Collect the commit, the versions of program and libraries, the command, and the driver's machine, in words."""
    import torch

    gpus = list_gpu_names()
    cpus = f"{len(os.sched_getaffinity(0))} CPUs ({torch.backends.cpu.get_cpu_capability()})"
    # A run in one process needs neither Ray nor MLflow.
    versions = {package: find_package_version(package) or "not installed" for package in PACKAGES}
    started = Path(sys.argv[0]).name in ("ddpm", "__main__.py")  # not an actor of Ray's
    words = [hide_password(word) if "://" in word else word for word in sys.argv[1:]]
    return {
        "commit": find_commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(["ddpm", *words]) if started else "",
        "host": platform.node(),
        "code": hash_code(experiment.model.name),
        "user": name_user(),
        "versions": {"ddpm-pipeline": find_version(), **versions},
        "hardware": f"{cpus}, {', '.join(gpus) or 'no GPU'}",
    }


def describe_other_code(place: Place) -> str | None:
    """Return a line that names both codes if other code trained the run or drew its samples; None if not."""
    codes = _read_codes(place)
    if not codes or (last := list(codes)[-1]) == (own := hash_code(place.experiment.model.name)):
        return None
    return (
        f"{place.name}: trained or drawn by {codes[last]} ({last}), this is {_name_code()} ({own}): "
        "results of other code; name=... for a new run, or --accept-code"
    )


def _name_code() -> str:
    return find_commit() or f"version {find_version()}"


def _read_codes(place: Place) -> dict[str, str]:
    """Return the codes that trained the run and drew its samples, by their hashes, the newest last."""
    try:
        codes = place.read_provenance().get("codes")
    except (PipelineError, OSError):  # a damaged record is written again
        return {}
    return {str(key): str(name) for key, name in codes.items()} if isinstance(codes, dict) else {}


def write_record(place: Place, todo: Sequence[Stage], accept_code: bool = False) -> None:
    """Write experiment.yaml, the resolved configuration and its provenance, and keep the patch of a changed tree.

    Raises PipelineError if a stage of `todo` would add to results of other code, unless `accept_code`.
    """
    codes = _read_codes(place)
    if any(stage.adds_to_run for stage in todo):
        if (problem := describe_other_code(place)) and not accept_code:
            raise PipelineError(problem)
        own = hash_code(place.experiment.model.name)
        codes = {key: name for key, name in codes.items() if key != own} | {own: _name_code()}
    record = collect_provenance(place.experiment)
    record |= {"codes": codes, "data_key": place.data_key, "keys": keys.VERSION}
    write_text(place.experiment_yaml, config.to_yaml(place.experiment, made_with=record))
    if patch := read_commit()[1]:
        write_text(place.locate_patch(hash_patch(patch)), patch)
