"""What there is: the runs of a storage root, and what this machine offers."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline import config
from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError
from pipeline.scores.metrics import METRICS, format_headline
from pipeline.store import checkpoint
from pipeline.store.files import read_json


def table(root: Path) -> str:
    """The runs below `root`: stages, steps, scores."""
    from rich.console import Console
    from rich.table import Table

    rows = [_row(path.parent) for path in sorted(root.glob("*/experiment.yaml"))]
    if not rows:
        return f"no runs in {root} yet; `ddpm run` makes one"
    shown = Table("run", "data", "step", "samples", "scores", "report", title=str(root), title_justify="left")
    for row in rows:
        shown.add_row(*row)
    console = Console(width=max(100, shutil.get_terminal_size().columns), markup=False)
    with console.capture() as capture:
        console.print(shown)
        if sweeps := [_sweep(path) for path in sorted(root.glob("sweeps/*/leaderboard.json"))]:
            shown = Table("sweep", "finished", "stopped", "failed", "best", "score", title_justify="left")
            for row in sweeps:
                shown.add_row(*row)
            console.print(shown)
    return capture.get().rstrip()


def _sweep(path: Path) -> list[str]:
    """One sweep, from its leaderboard."""
    content = read_json(path)
    trials, metric = content["trials"], METRICS[content["metric"]]
    states = [trial["state"] for trial in trials]
    best = content.get("best")
    return [
        path.parent.name,
        f"{states.count('finished')}/{len(trials)}",
        str(states.count("stopped") or "-"),
        str(states.count("failed") or "-"),
        best["name"] if best else "-",
        f"{metric.heading} {metric.format(best['mean'], best['spread'])}" if best else "-",
    ]


def _row(path: Path) -> list[str]:
    """One run, read from its files alone."""
    try:
        experiment = config.load_experiment(str(path / "experiment.yaml"), [])
    except PipelineError as error:
        problem = f"experiment.yaml cannot be read: {str(error).splitlines()[0]}"
        return [path.name, "-", "-", "-", problem, "-"]
    steps = checkpoint.steps_on_disk(path / "train")
    choices = [read_json(file) for file in sorted(path.glob("selection/*/selection.json"))]
    on_curves = {score["evaluation"] for choice in choices for score in choice["scores"]}
    scores = [f for f in sorted(path.glob("evaluation/*/metrics.json")) if f.parent.name not in on_curves]
    sets = [read_json(file) for file in path.glob("samples/*/manifest.json")]
    drawn = sum(split["count"] for index in sets for split in index["splits"].values())
    return [
        path.name,
        experiment.data.source,
        f"{max(steps, default=0)}/{experiment.train.steps}",
        str(drawn or "-"),
        "\n".join([*map(_choice, choices), *map(_scores, scores), *experiment.missing()]) or "-",
        "yes" if (path / "report" / "report.html").exists() else "-",
    ]


def _choice(choice: dict[str, Any]) -> str:
    fid = next(score["fid"] for score in choice["scores"] if score["step"] == choice["best"])
    of = f"of {len(choice['scores'])}, n={choice['n']}, {choice['weights']}"
    return f"best step {choice['best']}: FID {fid:.2f} ({of})"


def _scores(path: Path) -> str:
    metrics = read_json(path)
    scores, protocol = metrics["scores"], metrics["protocol"]
    about = f"step {protocol['checkpoint']}, {protocol['weights']}, n={protocol.get('n')}"
    return f"{format_headline(scores)} ({about}, {protocol.get('extractor', 'no features')})"


def doctor(cluster: ClusterConfig) -> str:
    """Devices, libraries, data, Inception weights, stores; what to do about what is missing."""
    lines = [*_machine(), *_libraries(), *_inception(), *_stores(cluster)]
    width = max(len(what) for what, _ in lines)
    return "\n".join(f"{what:<{width}}  {found}" for what, found in lines)


def _machine() -> list[tuple[str, str]]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("CPUs", f"{len(os.sched_getaffinity(0))} usable, {capability}"),
        ("memory", f"{memory:.0f} GiB"),
        ("GPUs", ", ".join(gpus) or "none: training runs on the CPUs; conf/cifar10.yaml wants a GPU"),
    ]


def _libraries() -> list[tuple[str, str]]:
    found = []
    for package in (
        "torch",
        "torchvision",
        "ray",
        "mlflow",
        "webdataset",
        "torch-fidelity",
        "omegaconf",
        "safetensors",
    ):
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, f"MISSING: pip install {package}"))
    return found


def _inception() -> list[tuple[str, str]]:
    from pipeline.scores import inception

    path = inception.download_path()
    absent = f"not at {path}; fetched when first needed, or name a file in evaluate.extractor_weights"
    return [("Inception weights", str(path) if path.exists() else absent)]


def _stores(cluster: ClusterConfig) -> list[tuple[str, str]]:
    from pipeline import tracking
    from pipeline.engine import execute as stages

    try:
        root = stages.storage_root(cluster)
    except PipelineError as error:
        return [("storage", f"PROBLEM: {error}")]
    free = shutil.disk_usage(root).free / 2**30
    found = [("storage", f"{root}, {free:.0f} GiB free")]
    uri = cluster.tracking_uri or tracking.default_uri(root)
    try:
        tracking.check(uri)
        found.append(("tracking", uri))
    except PipelineError as error:
        found.append(("tracking", f"PROBLEM: {error}"))
    return found
