"""What was run, on what, for how long, and what a full run would take."""

from __future__ import annotations

import yaml

from pipeline.checkpoint import new_network
from pipeline.config import Experiment
from pipeline.progress import duration
from pipeline.report import paper
from pipeline.report.page import Block, Table
from pipeline.report.source import Source, missing
from pipeline.report.training import rate

TIMED = ("shard", "train", "sample", "evaluate", "figures")


def section(source: Source) -> list[Block]:
    tree = yaml.safe_load(source.files["experiment"].read_text()) if "experiment" in source.files else {}
    made = tree.get("made_with") or {}
    rows = [("Network", f"{source.experiment.model.name}, {_parameters(source.experiment):,} parameters")]
    rows += [("Commit", f"`{made['commit']}`")] if made.get("commit") else []
    rows += [("Hardware", str(made["hardware"]))] if made.get("hardware") else []
    versions = ", ".join(f"{name} {version}" for name, version in (made.get("versions") or {}).items())
    rows += [("Versions", versions)] if versions else []
    took = [f"{stage} {duration(source.timings[stage])}" for stage in TIMED if stage in source.timings]
    rows += [("Time", " · ".join(took))] if took else []
    return [Table((), [*rows, *_projection(source)])]


def _parameters(experiment: Experiment) -> int:
    return sum(tensor.numel() for tensor in new_network(experiment, "meta").parameters())


def _projection(source: Source) -> list[tuple[str, str]]:
    """What the full training would take at the measured rate."""
    steps = paper.STEPS if source.is_cifar10 else source.experiment.train.steps
    if not source.points or not rate(source):
        return []
    pace = rate(source) / source.experiment.train.batch_size
    said = f"{steps:,} steps at the measured {pace:,.2f} steps/s: {duration(steps / pace)}"
    return [("Projected training time", said)]


def data(source: Source) -> list[Block]:
    manifest = source.read("data")
    if not manifest:
        return missing(source, "There are no shards yet", "shard")
    data = source.experiment.data
    size = sum(file["bytes"] for file in manifest["files"].values())
    counts = ", ".join(f"{split['count']:,} {name}" for name, split in manifest["splits"].items())
    rows = [
        ("Source", data.source),
        ("Images", counts),
        ("Shape", f"{data.image_size} × {data.image_size}, {'grey' if data.channels == 1 else 'colour'}"),
        ("Classes", str(data.labels) if data.labels else "no labels"),
        (
            "Shards",
            f"{len(manifest['files'])} tars, {size / 1e6:,.1f} MB, each with its sha256 in the manifest",
        ),
    ]
    rows += [("Fingerprint", f"`{manifest['fingerprint']}`")] if manifest.get("fingerprint") else []
    return [Table((), rows)]
