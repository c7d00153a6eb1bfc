"""What a run was made with, how long it took, and what a full run would take."""

from __future__ import annotations

from pipeline.console import duration
from pipeline.report import paper
from pipeline.report.page import escape
from pipeline.report.source import Source
from pipeline.store.checkpoint import new_network
from pipeline.store.run import STAGES


def list_work(source: Source) -> list[list[str]]:
    """List network, commits, hardware, versions and times, those that are known."""
    made, model = source.made_with, source.experiment.model
    parameters = sum(tensor.numel() for tensor in new_network(source.experiment, "meta").parameters())
    took = [f"{stage} {duration(source.timings[stage])}" for stage in STAGES if stage in source.timings]
    if len(took) > 1:
        took.append(f"**{duration(sum(source.timings.values()))} in all**")
    facts = {
        "Network": f"{escape(model.name)}, {parameters:,} parameters",
        "Commit": _list_commits(source),
        "Hardware": escape(str(made.get("hardware") or "")),
        "Versions": ", ".join(f"{name} {version}" for name, version in (made.get("versions") or {}).items()),
        "Time": " · ".join(took),
    }
    return [[name, fact] for name, fact in facts.items() if fact]


def _list_commits(source: Source) -> str:
    """One commit where all stages have the same; else the stages of each."""
    stages: dict[str, list[str]] = {}
    for stage in STAGES:
        for commit in source.commits.get(stage, []):
            stages.setdefault(commit, []).append(stage)
    if len(stages) > 1:
        return " · ".join(f"{', '.join(names)} `{commit}`" for commit, names in stages.items())
    only = next(iter(stages), source.made_with.get("commit"))
    return f"`{only}`" if only else ""


def project_full_run(source: Source) -> list[list[str]]:
    """List what a full run would take here at the measured rates: the paper's counts for its own images, else
    what the experiment asks for."""
    e, rows = source.experiment, []
    if source.rate:
        steps = paper.STEPS if source.is_cifar10 else e.train.steps
        pace = source.rate / e.train.batch_size
        rows.append(["Training", f"{pace:,.2f} steps/s", f"{steps:,} steps", duration(steps / pace)])
    chains = source.spent.get("samples")
    if chains:  # the chain measured at most, stretched to the length of the full one
        length, chain = max(chains.items(), key=lambda item: item[1]["images"])
        n = paper.SAMPLES if source.is_cifar10 else e.sample.num_images
        steps = e.diffusion.timesteps if source.is_cifar10 else e.sample.steps or e.diffusion.timesteps
        pace = chain["images"] / chain["seconds"]
        measured = f"{pace:,.2f} images/s of {int(length):,} steps"
        projected = duration(n / pace * steps / int(length))
        rows.append(["Sampling", measured, f"{n:,} images of {steps:,} steps", projected])
    bounds = source.spent.get("nll", {}).values()  # it takes all T terms, however samples are drawn
    images, seconds = sum(cost["images"] for cost in bounds), sum(cost["seconds"] for cost in bounds)
    if images:
        n = paper.TEST_IMAGES if source.is_cifar10 else e.evaluate.nll_images or images
        rows.append(
            [
                "NLL bound",
                f"{images / seconds:,.2f} images/s",
                f"{n:,} images",
                duration(n * seconds / images),
            ]
        )
    return rows


def list_data(source: Source) -> list[list[str]]:
    """List what the data's manifest says; nothing before there are shards."""
    manifest, data = source.read("data"), source.experiment.data
    if not manifest:
        return []
    size = sum(file["bytes"] for file in manifest["files"].values())
    tars = f"{len(manifest['files'])} tars, {size / 1e6:,.1f} MB, each with its sha256 in the manifest"
    rows = [
        ["Source", data.source],
        ["Images", ", ".join(f"{split['count']:,} {name}" for name, split in manifest["splits"].items())],
        ["Shape", f"{data.image_size} × {data.image_size}, {'grey' if data.channels == 1 else 'colour'}"],
        ["Classes", str(data.labels) if data.labels else "no labels"],
        ["Shards", tars],
    ]
    if manifest.get("fingerprint"):
        rows.append(["Fingerprint", f"`{manifest['fingerprint']}`"])
    return rows
