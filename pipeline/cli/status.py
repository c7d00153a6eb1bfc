"""The texts of `ddpm status` and `ddpm doctor`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline import config
from pipeline.compute.resources import list_gpu_names
from pipeline.config import ClusterConfig
from pipeline.console import format_table
from pipeline.engine import find
from pipeline.engine.provenance import PACKAGES, find_package_version
from pipeline.errors import PipelineError, hide_password
from pipeline.scores.metrics import METRICS, Results, format_headline
from pipeline.store import run
from pipeline.store.files import read_json, read_sealed
from pipeline.store.log import RECENT, LogPoint, describe_slow_rank, read_points, read_progress
from pipeline.store.selection import Selection
from pipeline.store.tars import ShardSetFacts

PROGRAMS = r"ray::\w+|\braylet\b|gcs_server|mlflow|pipeline \w+|ddpm \w+"
ROW = "{:<11} {:>6} {:>6}  {:<13}  {}"  # of a run


def format_status(root: Path) -> str:
    """Return the tables of the runs and studies below `root`, read from their files alone."""
    changed = {path: run.find_last_change(path) for path in run.find_runs(root)}
    if not changed:
        return f"no runs in {root} yet; `ddpm run` makes one, cluster.storage=FOLDER shows another root"
    runs, studies, problems = [], [], []
    for path in sorted(changed, key=changed.__getitem__, reverse=True):
        try:
            if old := find.explain_first_version(path):
                problems.append(old)
            else:
                runs.append(_describe_run(path, changed[path]))
        except PipelineError as error:
            problems.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
    for path in run.find_leaderboards(root):
        try:
            studies.append(_describe_study(path))
        except (PipelineError, KeyError, TypeError) as error:
            problems.append(f"{path} cannot be read: {error}")
    head = [f"{root}\n{ROW.format('state', 'age', 'left', 'steps', 'run')}"] if runs else []
    tables = [*head, *runs, *problems]
    if studies:
        tables.append(format_table(("sweep", "finished", "stopped", "failed", "best", "score"), studies))
    return "\n".join(tables)


def _describe_study(leaderboard: Path) -> list[str]:
    content = read_json(leaderboard, dict[str, Any])
    metric, best = METRICS[content["metric"]], content.get("best")
    states = [trial["state"] for trial in content["trials"]]
    return [
        leaderboard.parent.name,
        f"{states.count('finished')}/{len(states)}",
        str(states.count("stopped") or "-"),
        str(states.count("failed") or "-"),
        f"{best['rank']}. {best['name']}" if best else "-",
        f"{metric.heading} {metric.format(best['mean'], best.get('error'))}" if best else "-",
    ]


def _describe_run(path: Path, changed: float) -> str:
    """Return the row of a run, and below it its scores, within the width of the terminal."""
    experiment = config.load_experiment(str(path / run.EXPERIMENT), [])
    place = run.locate_without_data(path, experiment)
    step, steps, state = read_progress(place)[0], experiment.train.steps, run.find_state(path)
    selections = [read_sealed(file, Selection) for file in run.find_selections(path)]
    of_candidates = {score["evaluation"] for selected in selections for score in selected["scores"]}
    sets = [read_json(file, ShardSetFacts)["splits"] for file in run.find_sample_manifests(path)]
    images = sum(split["count"] for splits in sets for split in splits.values())
    lines = []
    for selected in selections:
        fid = min(score["fid"] for score in selected["scores"])
        of = f"of {len(selected['scores'])}, n={selected['n']}, {selected['weights']}"
        lines.append(f"best step {selected['best']}: FID {fid:.2f} ({of})")
    for file in run.find_scores(path):
        if file.parent.name in of_candidates:
            continue
        found = read_sealed(file, Results)
        protocol = found["protocol"]
        about = f"step {protocol.get('checkpoint')}, {protocol.get('weights')}, n={protocol.get('n')}"
        extractor = protocol.get("extractor", "no features")
        lines.append(f"{format_headline(found['scores'])} ({about}, {extractor})")
    trained = "imported" if experiment.published.weights else f"{step}/{steps}"
    points = read_points(place.log)[-RECENT:] if state == "running" else []
    left = _format_age(seconds) if (seconds := _estimate_seconds_left(points, steps - step)) else "-"
    row = ROW.format(state, _format_age(time.time() - changed), left, trained, path.name)
    slow = filter(None, [describe_slow_rank(points)])
    lines = [f"{experiment.data.source}, {images} samples", *lines, *slow, *experiment.find_missing_files()]
    width = shutil.get_terminal_size().columns
    return "\n".join([row, *(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="      ",
        break_long_words=False, break_on_hyphens=False) for line in lines)])  # fmt: skip


def _estimate_seconds_left(points: list[LogPoint], steps: int) -> float:
    """Estimate the seconds of the remaining steps from the last points of the log; 0 if there are too few."""
    done = points[-1]["step"] - points[0]["step"] if points else 0
    each = (points[-1]["time"] - points[0]["time"]) / done / 1000 if done else 0.0
    return each * max(0, steps)


def _format_age(seconds: float) -> str:
    sizes = (("d", 86400), ("h", 3600), ("min", 60))
    unit, size = next(((unit, size) for unit, size in sizes if seconds >= size), ("s", 1))
    return f"{max(0, int(seconds / size))} {unit}"


def diagnose(cluster: ClusterConfig) -> str:
    """Report on devices, libraries, Inception weights and stores, with a remedy for everything that is missing."""
    return "\n".join(f"{name:<17}  {fact}" for name, fact in _list_machine_checks(cluster))


def _list_machine_checks(cluster: ClusterConfig) -> Iterator[tuple[str, str]]:
    import torch

    from pipeline import tracking
    from pipeline.scores import inception

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = list_gpu_names()
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "CPUs", f"{len(os.sched_getaffinity(0))} usable, {torch.backends.cpu.get_cpu_capability()}"
    yield "memory", f"{memory:.0f} GiB"
    yield "GPUs", ", ".join(gpus) or "none: training runs on the CPUs; conf/cifar10.yaml needs a GPU"
    for package in ("torchvision", "safetensors", *PACKAGES):
        yield package, find_package_version(package) or f"MISSING: pip install {package}"
    weights = inception.locate_download()
    absent = f"not at {weights}; fetched when first needed, or name a file in evaluate.extractor_weights"
    yield "Inception weights", str(weights) if weights.exists() else absent
    try:
        root = find.prepare_storage_root(cluster)
        fault = find.find_storage_problems(root)
        free = f"{shutil.disk_usage(root).free / 2**30:.0f} GiB free"
        works = f"{root}, {free}; it locks, renames and flushes as it must"
        yield "storage", f"PROBLEM: {root}: {fault}" if fault else works
    except PipelineError as error:
        yield "storage", f"PROBLEM: {error}"
        return
    uri = tracking.find_uri(cluster)
    try:
        tracking.check_server(uri)
        yield "tracking", hide_password(uri)
    except PipelineError as error:
        yield "tracking", f"PROBLEM: {error}"
    if cluster.ray_address:
        yield "machines", _describe_machines(root, cluster.ray_address)
    yield "open ports", ", ".join(_list_open_ports()) or "none now; SECURITY.md lists those of each command"


def _describe_machines(root: Path, address: str) -> str:
    try:
        seen = find.find_machine_problems(root, address)
    except PipelineError as error:
        return f"PROBLEM: {error}"
    faults = [f"{machine} {fault}" for machine, fault in seen.items() if fault]
    return f"PROBLEM: {root}: {'; '.join(faults)}" if faults else f"{len(seen)} see this folder and its locks"


def _list_open_ports() -> Iterator[str]:
    """List the ports of Ray, MLflow and this program that other machines can reach; without those of other users."""
    for socket in psutil.net_connections("tcp"):
        if socket.pid and socket.status == "LISTEN" and not socket.laddr.ip.endswith(("127.0.0.1", "::1")):
            with suppress(psutil.Error):
                if found := re.search(PROGRAMS, " ".join(psutil.Process(socket.pid).cmdline())):
                    yield f"{found[0]} on {socket.laddr.ip}:{socket.laddr.port}"
