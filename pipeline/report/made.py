"""What was run, on what, for how long, and what a full run would take."""

from __future__ import annotations

from pipeline.config import Experiment
from pipeline.console import duration
from pipeline.report import paper
from pipeline.report.page import Block, Table, Text
from pipeline.report.source import Source, missing
from pipeline.report.training import rate
from pipeline.store.checkpoint import new_network
from pipeline.store.run import STAGES


def section(source: Source) -> list[Block]:
    made = source.made_with
    rows = [("Network", f"{source.experiment.model.name}, {_parameters(source.experiment):,} parameters")]
    rows += [("Commit", commits)] if (commits := _commits(source)) else []
    rows += [("Hardware", str(made["hardware"]))] if made.get("hardware") else []
    versions = ", ".join(f"{name} {version}" for name, version in (made.get("versions") or {}).items())
    rows += [("Versions", versions)] if versions else []
    took = [f"{stage} {duration(source.timings[stage])}" for stage in STAGES if stage in source.timings]
    took += [f"**{duration(sum(source.timings.values()))} in all**"] if len(took) > 1 else []
    rows += [("Time", " · ".join(took))] if took else []
    return [Table((), rows), *_full_run(source)]


def _commits(source: Source) -> str:
    """One commit where all stages have the same; else the stages of each."""
    stages: dict[str, list[str]] = {}
    for stage in STAGES:
        for commit in source.commits.get(stage, []):
            stages.setdefault(commit, []).append(stage)
    if len(stages) > 1:
        return " · ".join(f"{', '.join(names)} `{commit}`" for commit, names in stages.items())
    only = next(iter(stages), source.made_with.get("commit"))
    return f"`{only}`" if only else ""


def _parameters(experiment: Experiment) -> int:
    return sum(tensor.numel() for tensor in new_network(experiment, "meta").parameters())


def _full_run(source: Source) -> list[Block]:
    """What a full run would take here at the measured rates: the paper's counts for its own images, else what
    the experiment asks for."""
    rows = [row for row in (_training(source), _sampling(source), _bound(source)) if row]
    if not rows:
        return []
    whole = "The paper's run" if source.is_cifar10 else "The whole experiment"
    said = (
        f"{whole} on this hardware, projected from the measured rates. Training is wall-clock time of all workers "
        "together; sampling and the bound are hours of one worker, loading and writing included, to be divided by "
        "how many there are. Features and figures come on top. The cost is these hours times what an hour costs "
        "you; no price is assumed here."
    )
    return [Text(said), Table(("", "Measured", "Full run", "Projected"), rows)]


def _training(source: Source) -> list[str] | None:
    if not source.points or not rate(source):
        return None
    steps = paper.STEPS if source.is_cifar10 else source.experiment.train.steps
    pace = rate(source) / source.experiment.train.batch_size
    return ["Training", f"{pace:,.2f} steps/s", f"{steps:,} steps", duration(steps / pace)]


def _sampling(source: Source) -> list[str] | None:
    """From the chain measured at most, stretched to the length of the full one."""
    e, chains = source.experiment, source.spent.get("samples", {})
    if not chains:
        return None
    measured = max(chains, key=lambda chain: chains[chain]["images"])
    images, seconds = chains[measured]["images"], chains[measured]["seconds"]
    n = paper.SAMPLES if source.is_cifar10 else e.sample.num_images
    steps = e.diffusion.timesteps if source.is_cifar10 else e.sample.steps or e.diffusion.timesteps
    projected = duration(n * seconds / images * steps / int(measured))
    pace = f"{images / seconds:,.2f} images/s of {int(measured):,} steps"
    return ["Sampling", pace, f"{n:,} images of {steps:,} steps", projected]


def _bound(source: Source) -> list[str] | None:
    noted = source.spent.get("nll", {}).values()  # it takes all T terms, however samples are drawn
    images, seconds = (sum(part[name] for part in noted) for name in ("images", "seconds"))
    if not images:
        return None
    n = paper.TEST_IMAGES if source.is_cifar10 else source.experiment.evaluate.nll_images or images
    return ["NLL bound", f"{images / seconds:,.2f} images/s", f"{n:,} images", duration(n * seconds / images)]


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
