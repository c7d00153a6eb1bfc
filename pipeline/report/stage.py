"""The report stage: report.html and report.md from the files of a run. It needs neither network nor GPU.

Whatever is not there yet is left out, with the command that makes it. The report is made again exactly when a
file that it shows has changed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from ddpm.schedules import betas
from pipeline import config
from pipeline.checkpoint import new_network
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.progress import duration
from pipeline.report import page, paper, plots
from pipeline.report.page import Block, Card, Cards, Code, Page, Picture, Pictures, Section, Table, Text
from pipeline.rundir import (
    MANIFEST,
    Run,
    atomic_directory,
    read_json,
    read_manifest,
    sha256_of,
    write_manifest,
)
from pipeline.worker import Unit

HTML, MARKDOWN = "report.html", "report.md"
LEAST_WIDTH = 1000  # pixels; smaller pictures are enlarged, so that their pixels stay sharp
GRIDS_SHOWN = 4
RATE_DISTORTION = "rate_distortion.svg"  # stands with the numbers, not among the samples
TIMED = ("shard", "train", "sample", "evaluate", "figures")
FIRM = "\u00a0"  # a space that does not break the line

NAMES = {
    "test": "Test images", "train": "Training images", "gaussian": "Gaussian, training mean and covariance",
    "noise": "Uniform noise",
}  # fmt: skip
PROTOCOL = {
    "n": "Images scored", "checkpoint": "Checkpoint (step)", "weights": "Weights", "sampler": "Sampler",
    "steps": "Sampling steps", "eta": "eta", "variance": "Sampling variance", "rounding": "Rounding to uint8",
    "reference": "Reference split", "reference_images": "Reference images", "extractor": "Feature extractor",
    "features": "Feature width", "splits": "Splits of the IS", "nll_images": "Test images in the NLL",
    "test_images": "Test images", "nll_variance": "Variance in the NLL", "decoder": "Decoder",
    "batch_size": "Images per sampling unit", "seed": "Seed",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The files that a report is made of, those that are there."""

    experiment: Experiment
    run: Run

    @cached_property
    def files(self) -> dict[str, Path]:
        e, run = self.experiment, self.run
        evaluation = run.evaluation(config.evaluate_key(e, run.run_key))
        found = {
            "experiment": run.experiment_yaml,
            "log": run.log,
            "data": run.data / MANIFEST,
            "grid": run.samples(config.sample_key(e, run.run_key)) / "grid.png",
            "metrics": evaluation / "metrics.json",
            "nll": evaluation / "nll.json",
            "figures": run.figures(config.figures_key(e, run.run_key)) / MANIFEST,
        }
        found |= {f"grid {path.stem}": path for path in run.grids.glob("[0-9]*.png")}
        return {name: path for name, path in found.items() if path.is_file()}

    def read(self, name: str) -> dict[str, Any]:
        return read_json(self.files[name]) if name in self.files else {}

    @cached_property
    def timings(self) -> dict[str, float]:
        """Seconds by stage; without this stage's own, which is known only after it."""
        path = self.run.path / "timings.json"
        return {k: v for k, v in read_json(path).items() if k != "report"} if path.exists() else {}

    @cached_property
    def digest(self) -> str:
        hashes = {name: sha256_of(path) for name, path in self.files.items()}
        return config.hash_of([hashes, self.timings])

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return {"scores": {}, "protocol": {}, "reference_points": {}} | self.read("metrics")

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        if "log" not in self.files:
            return []
        lines = self.files["log"].read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def is_cifar10(self) -> bool:
        return self.experiment.data.source == "cifar10"

    @property
    def is_comparable(self) -> bool:
        return self.is_cifar10 and bool(self.metrics["protocol"].get("comparable"))


def is_done(experiment: Experiment, run: Run) -> bool:
    try:
        manifest = read_manifest(run.report)
    except PipelineError:
        return False
    return manifest is not None and manifest["inputs"] == Source(experiment, run).digest


def work(experiment: Experiment, run: Run) -> Iterator[list[Unit]]:
    """Writes the report in the driver: there is nothing to hand out."""
    source = Source(experiment, run)
    made = compose(source)
    with atomic_directory(run.report) as folder:
        (folder / HTML).write_text(page.to_html(made), encoding="utf-8")
        (folder / MARKDOWN).write_text(page.to_markdown(made), encoding="utf-8")
        for picture in made.pictures:
            (folder / picture.name).write_bytes(picture.data)
        names = [HTML, MARKDOWN, *(picture.name for picture in made.pictures)]
        write_manifest(folder, names, inputs=source.digest)
    yield from ()


def compose(source: Source) -> Page:
    e, run = source.experiment, source.run
    sections = [
        Section("Scores", _scores(source)),
        Section("Samples", _samples(source)),
        Section("Training", _training(source)),
        Section("Likelihood", _likelihood(source)),
        Section("Rate and distortion", _rate_distortion(source)),
        Section("Noise schedule", _schedule(source)),
        Section("What was run", _what_was_run(source)),
        Section("Data", _data(source)),
        Section("Configuration", [Code("The resolved experiment", config.to_yaml(e))]),
    ]
    subtitle = f"Denoising diffusion on {e.data.source} · run `{run.run_key}` · data `{run.data_key}`"
    head = [Cards(_cards(source))] if source.metrics["scores"] else []
    return Page(e.name, subtitle, _verdict(source), head, [s for s in sections if s.blocks])


def _missing(source: Source, what: str, stage: str) -> list[Block]:
    return [Text(f"{what}: `ddpm {stage} {source.experiment.name}` with the same overrides makes them.")]


# Scores


def _verdict(source: Source) -> str:
    """The page in a sentence."""
    step = source.metrics["protocol"].get("checkpoint") or (source.points[-1]["step"] if source.points else 0)
    scores, after = source.metrics["scores"], f"After {step:,} training steps"
    if not step:
        return "Not trained yet."
    if not scores:
        return f"{after}: not scored yet."
    said = [f"{label}{FIRM}{_score(scores, key)}" for label, key in _SHOWN if key in scores]
    if source.is_comparable:
        return f"{after}: {', '.join(said)}, by the paper's protocol ({_paper_row()})."
    gaussian = source.metrics["reference_points"].get("gaussian", {}).get("fid")
    if gaussian and "fid" in scores:
        share = scores["fid"] / gaussian
        said[0] += (
            f" ({f'{share:.0%} of' if share < 1 else f'{share:.1f} times'} a Gaussian's {gaussian:,.1f})"
        )
    tail = ". Not comparable with the paper's row, for the reasons below" if source.is_cifar10 else ""
    return f"{after}: {', '.join(said)}{tail}."


_SHOWN = (("FID", "fid"), ("IS", "is_mean"), ("NLL", "nll_bpd"))


def _paper_row() -> str:
    return ", ".join(f"{label} {paper.ROW[key]}".replace(" ", FIRM) for label, key in _SHOWN)


def _score(scores: dict[str, float], key: str) -> str:
    """A score as the paper prints it, or a dash."""
    if scores.get(key) is None:
        return "–"
    if key == "is_mean":
        return f"{scores[key]:.2f}" + (f"{FIRM}±{FIRM}{scores['is_std']:.2f}" if "is_std" in scores else "")
    return f"≤{FIRM}{scores[key]:.2f} bits/dim" if key == "nll_bpd" else f"{scores[key]:,.2f}"


def _cards(source: Source) -> list[Card]:
    scores, points = source.metrics["scores"], source.metrics["reference_points"]
    comparable = source.is_comparable
    badge = ("comparable" if comparable else "not comparable", comparable) if source.is_cifar10 else None
    cards = []
    for label, key in _SHOWN:
        if key not in scores:
            continue
        beside = [f"paper {paper.ROW[key]}"] if source.is_cifar10 else []
        beside += [
            f"{name} {_score(points[point], key)}"
            for name, point in (("test images", "test"), ("Gaussian", "gaussian"))
            if not comparable and key in points.get(point, {})
        ]
        value = _score(scores, key).removesuffix(" bits/dim")
        full = f"{label} in bits/dim" if key == "nll_bpd" else label
        cards.append(Card(full, value, " · ".join(beside) or "upper bound, test images", badge))
    return cards


def _scores(source: Source) -> list[Block]:
    if not source.metrics["scores"]:
        return _missing(source, "There are no scores yet", "evaluate")
    protocol = source.metrics["protocol"]
    n = f"{protocol['n']:,}" if protocol.get("n") else "–"
    rows = [["This run", *_row(source.metrics["scores"]), n]]
    if source.is_cifar10:
        rows.append(
            [
                "Paper, Table 1, L_simple",
                paper.ROW["fid"],
                paper.ROW["is_mean"],
                paper.ROW["nll_bpd"],
                paper.ROW["n"],
            ]
        )
    points = source.metrics["reference_points"]
    rows += [[NAMES[name], *_row(points[name]), f"{points[name]['n']:,}"] for name in NAMES if name in points]
    header = ("", "FID", "IS", "NLL, bits/dim", "n")
    return [Table(header, rows, frozenset({0})), Text(_how_to_read(source)), *_protocol(protocol)]


def _row(scores: dict[str, float]) -> list[str]:
    return [_score(scores, key).removesuffix(" bits/dim") for _, key in _SHOWN]


def _how_to_read(source: Source) -> str:
    protocol = source.metrics["protocol"]
    features = f" Features are those of `{protocol['extractor']}`." if protocol.get("extractor") else ""
    points = (
        " Test images, Gaussian and noise are reference points, scored in the same way." if features else ""
    )
    if source.is_comparable:
        return f"**Comparable with the paper**: the protocol is the paper's.{features}{points}"
    if source.is_cifar10:
        reasons = "; ".join(protocol.get("why_not") or ["the protocol differs"])
        return f"**Not comparable with the paper**: {reasons}.{features}{points}"
    short = "".join(f" **{why}**." for why in protocol.get("why_not", []) if why.startswith("rank-deficient"))
    return f"The paper has no row for these images, so none is beside this run.{features}{points}{short}"


def _protocol(protocol: dict[str, Any]) -> list[Block]:
    rows = [(name, _plain(protocol[key])) for key, name in PROTOCOL.items() if protocol.get(key) is not None]
    return [Text("How they came about:"), Table((), rows, dense=True)] if rows else []


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# Pictures


def _samples(source: Source) -> list[Block]:
    if "grid" not in source.files:
        return _missing(source, "There are no samples yet", "sample")
    drawn = _figures(source)
    shown = [picture for name, picture in drawn.items() if name != RATE_DISTORTION]
    if "samples.png" not in drawn:
        shown.insert(
            0, Picture("grid.png", _enlarged(source.files["grid"]), "The first samples, not selected")
        )
    blocks: list[Block] = [Pictures(shown, wide=True)]
    if "figures" not in source.files:
        blocks += _missing(source, "There are no figures of the paper yet", "figures")
    left_out = source.read("figures").get("skipped", {})
    if left_out:
        reasons = "; ".join(f"`{name}`, because {why}" for name, why in left_out.items())
        blocks.append(Text(f"Not drawn: {reasons}."))
    return blocks + _class_shares(source)


def _figures(source: Source) -> dict[str, Picture]:
    """What the figures stage drew, in its order, by file name."""
    manifest = source.read("figures")
    captions = manifest.get("captions", {})
    pictures = {}
    for name in manifest.get("order", sorted(captions)):
        file = source.files["figures"].parent / name
        data = file.read_bytes() if file.suffix == ".svg" else _enlarged(file)
        pictures[name] = Picture(name, data, captions[name])
    return pictures


def _class_shares(source: Source) -> list[Block]:
    shares = source.metrics.get("class_shares")
    if not shares:
        return []
    said = f"Each class holds {min(shares):.1%} to {max(shares):.1%} of the samples, as the classifier sees them."
    percent = [100 * share for share in shares]
    return [Pictures([plots.bars("classes", "Samples by class, %", percent, x="class", caption=said)])]


def _enlarged(path: Path) -> bytes:
    """PNG of at least LEAST_WIDTH pixels, each of the original's repeated."""
    with Image.open(path) as image:
        times = -(-LEAST_WIDTH // image.width)
        if times == 1:
            return path.read_bytes()
        stream = BytesIO()
        image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST).save(
            stream, "PNG"
        )
        return stream.getvalue()


# Training


def _training(source: Source) -> list[Block]:
    published = source.experiment.published
    if published.weights:
        return [Text(f"Nothing was trained: the weights are published ones ({published.weights}).")]
    if not source.points:
        return _missing(source, "There is no training curve yet", "train")
    last = source.points[-1]["step"]
    batch = source.experiment.train.batch_size
    said = f"{last:,} steps of {batch:,} images, {_rate(source):,.0f} images/s (median)."
    blocks: list[Block] = [Text(said), Pictures(plots.training(source.points))]
    grids = _shown_grids(source)
    if grids:
        blocks += [Text("EMA samples from the same noise, as training went on:"), Pictures(grids)]
    return blocks


def _rate(source: Source) -> float:
    rates = [point["metrics"].get("train/images_per_second", 0.0) for point in source.points]
    return statistics.median(rates)


def _shown_grids(source: Source) -> list[Picture]:
    """A few of the grids, the first and the last among them."""
    names = sorted(name for name in source.files if name.startswith("grid "))
    last = len(names) - 1
    places = sorted({round(i * last / (GRIDS_SHOWN - 1)) for i in range(GRIDS_SHOWN)}) if names else []
    steps = [int(names[place].split()[1]) for place in places]
    return [
        Picture(f"step-{step}.png", _enlarged(source.files[f"grid {step:08d}"]), f"Step {step:,}")
        for step in steps
    ]


# Likelihood


def _likelihood(source: Source) -> list[Block]:
    nll, scores = source.read("nll"), source.metrics["scores"]
    if not nll or "nll_bpd" not in scores:
        return _missing(source, "There are no NLL terms yet", "evaluate")
    said = (
        f"**NLL ≤ {scores['nll_bpd']:.4f} bits/dim** = rate {scores['rate_bpd']:.4f} (L_1 to L_T) "
        f"+ distortion {scores['distortion_bpd']:.4f} (L_0), the prior's L_T being {nll['prior']:.2e}; "
        f"means over {nll['n']:,} test images, one noise draw for each timestep."
    )
    return [Text(said), Pictures(plots.likelihood(nll["terms"], nll["mse"]))]


def _rate_distortion(source: Source) -> list[Block]:
    rows = source.read("nll").get("rate_distortion", [])
    if not rows:
        return []
    beside = paper.TABLE_4 if source.is_cifar10 else {}
    said = (
        "What x_t costs when it is sent step by step, and how far off the estimate of x_0 then is, on the scale "
        "0 to 255."
    )
    drawn = _figures(source).get(RATE_DISTORTION)
    # Our own panels add the paper's points; without these they would be the figure once more.
    panels = [Pictures(plots.rate_distortion(rows, beside))] if beside or not drawn else []
    return [Text(said), *([Pictures([drawn], wide=True)] if drawn else []), *panels, _table_4(rows, beside)]


def _table_4(rows: list[dict[str, float]], beside: dict[int, tuple[float, float]]) -> Table:
    """Every tenth of the reverse process, as the paper's Table 4."""
    tenth = max(1, len(rows) // 10)
    cells = []
    for row in reversed(rows):
        if row["k"] % tenth == 0:
            its = beside.get(int(row["k"]), ())
            cells.append([f"{row['k']}", *(f"{x:.5f}" for x in (row["rate_bpd"], row["rmse"], *its))])
    return Table(
        ["Reverse steps", "Rate, bits/dim", "RMSE", "Paper: rate", "Paper: RMSE"][: len(cells[0])], cells
    )


def _schedule(source: Source) -> list[Block]:
    d = source.experiment.diffusion
    beta = betas(d.beta_schedule, d.timesteps, d.beta_start, d.beta_end)
    alpha_bar = torch.cumprod(1 - beta, 0)
    said = (
        f"`{d.beta_schedule}`, T = {d.timesteps:,}; at t = T the image keeps ᾱ = {alpha_bar[-1].item():.2e}."
    )
    return [Text(said), Pictures(plots.schedule(beta.tolist(), alpha_bar.tolist()))]


# What was run


def _what_was_run(source: Source) -> list[Block]:
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
    if not source.points or not _rate(source):
        return []
    rate = _rate(source) / source.experiment.train.batch_size
    said = f"{steps:,} steps at the measured {rate:,.2f} steps/s: {duration(steps / rate)}"
    return [("Projected training time", said)]


def _data(source: Source) -> list[Block]:
    manifest = source.read("data")
    if not manifest:
        return _missing(source, "There are no shards yet", "shard")
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
