"""The page in a sentence, the scores, and how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.report import paper
from pipeline.report.page import Block, Card, Table, Text
from pipeline.report.source import Source, missing
from pipeline.scores.metrics import FIRM, HEADLINE, METRICS

POINTS = {"test": "Test images", "train": "Training images", "gaussian": "Gaussian", "noise": "Noise"}
PROTOCOL = {
    "n": "Images scored", "checkpoint": "Checkpoint (step)", "checkpoint_rule": "Chosen as", "weights": "Weights",
    "sampler": "Sampler", "steps": "Sampling steps", "eta": "eta", "variance": "Sampling variance",
    "rounding": "Rounding to uint8", "reference": "Reference", "reference_images": "Reference images",
    "fid_test_images": "Test images in FID, test set", "extractor": "Feature extractor",
    "features": "Feature width", "splits": "Splits of the IS", "kid": "KID", "prc": "Precision and recall",
    "nll_images": "Test images in the NLL", "test_images": "Test images", "nll_variance": "Variance in the NLL",
    "decoder": "Decoder", "precision": "Sampling precision", "compiled": "Sampling compiled",
    "nll_precision": "NLL precision", "batch_size": "Images per sampling unit", "seed": "Seed",
}  # fmt: skip


def verdict(source: Source) -> str:
    """The page in a sentence or two; that a network is of no use yet comes first."""
    step = source.metrics["protocol"].get("checkpoint") or (source.points[-1]["step"] if source.points else 0)
    if not step:
        return "Not trained yet."
    after = f"After {step:,} training steps"
    if not source.metrics["scores"]:
        return f"{after}: not scored yet."
    return f"{not_yet_useful(source)}{after}: {_headline(source)}."


def not_yet_useful(source: Source) -> str:
    """A sentence where a network of CIFAR-10 does not beat the best linear denoiser, which needs no training;
    nothing where it does, or where nothing says so.

    The line holds for the paper's noise schedule, and its rate for fixedlarge: another variance costs other bits.
    """
    d, scores = source.experiment.diffusion, source.metrics["scores"]
    if not (source.is_cifar10 and paper.has_its_schedule(d) and "rmse" in scores):
        return ""
    lines = {"rmse": "RMSE"}
    if source.metrics["protocol"].get("nll_variance", d.variance) == "fixedlarge":
        lines = {"rate_bpd": "rate", **lines}
    if all(scores[key] < paper.LMMSE[key] for key in lines):
        return ""
    ours = ", ".join(f"{name}{FIRM}{scores[key]:.4f}" for key, name in lines.items())
    line = ", ".join(f"{name}{FIRM}{paper.LMMSE[key]:.4f}" for key, name in lines.items())
    return (
        "**Not yet useful**: the best linear denoiser, which needs no training, is not beaten "
        f"({ours}, against {line}). "
    )


def useless_ones(sources: Sequence[Source]) -> str:
    """The same of several: how many."""
    useless = sum(bool(not_yet_useful(source)) for source in sources)
    if not useless:
        return ""
    who = "none" if useless == len(sources) else f"only {len(sources) - useless}"
    return (
        f"**Not yet useful**: {who} of the {len(sources)} networks beats the best linear denoiser, which needs no "
        f"training (rate{FIRM}{paper.LMMSE['rate_bpd']:.4f}, RMSE{FIRM}{paper.LMMSE['rmse']:.4f}). "
    )


def _headline(source: Source) -> str:
    scores = source.metrics["scores"]
    said = [
        f"{m.heading}{FIRM}{m.format_from(scores)} {m.unit}".rstrip() for m in HEADLINE if m.name in scores
    ]
    if source.is_comparable:
        row = paper.row_of(source.experiment.diffusion)
        its = [f"{m.heading} {row.scores[m.name]}" for m in HEADLINE if m.name in row.scores] if row else []
        tail = ", ".join(its).replace(" ", FIRM) or "which prints no score for this objective"
        return f"{', '.join(said)}, by the paper's protocol ({tail})"
    gaussian = source.metrics["reference_points"].get("gaussian", {}).get("fid")
    if gaussian and "fid" in scores:
        share = scores["fid"] / gaussian
        said[0] += (
            f" ({f'{share:.0%} of' if share < 1 else f'{share:.1f} times'} a Gaussian's {gaussian:,.1f})"
        )
    return ", ".join(said) + (
        ". Not comparable with the paper's row, for the reasons below" if source.is_cifar10 else ""
    )


def cards(source: Source) -> list[Card]:
    scores, points = source.metrics["scores"], source.metrics["reference_points"]
    comparable = source.is_comparable
    row = paper.row_of(source.experiment.diffusion) if source.is_cifar10 else None
    badge = ("comparable" if comparable else "not comparable", comparable) if source.is_cifar10 else None
    made = []
    for metric in HEADLINE:
        if metric.name not in scores:
            continue
        beside = [f"paper {row.scores[metric.name]}"] if row and metric.name in row.scores else []
        beside += [
            f"{name} {metric.format_from(points[point])}"
            for name, point in (("test images", "test"), ("Gaussian", "gaussian"))
            if not comparable and metric.name in points.get(point, {})
        ]
        note = " · ".join(beside) or "upper bound, test images"
        made.append(Card(metric.title, metric.format_from(scores), note, badge))
    return made


def section(source: Source) -> list[Block]:
    """Every score that was asked for, beside those of images that are known."""
    if not source.metrics["scores"]:
        return missing(source, "There are no scores yet", "evaluate")
    protocol, points = source.metrics["protocol"], source.metrics["reference_points"]
    shown = [name for name in POINTS if name in points]
    columns = [source.metrics["scores"], *(points[name] for name in shown)]
    rows = [
        [metric.title, *(metric.format_from(column) for column in columns)]
        for metric in METRICS.values()
        if not metric.detail and any(metric.name in column for column in columns)
    ]
    n = [protocol.get("n"), *(points[name]["n"] for name in shown)]
    rows += [["Images", *(f"{count:,}" for count in n)]] if protocol.get("n") else []
    header = ("", "This run", *(POINTS[name] for name in shown))
    return [Table(header, rows, lead=True), Text(_how_to_read(source)), *_protocol(protocol)]


def _how_to_read(source: Source) -> str:
    protocol = source.metrics["protocol"]
    features = f"Features are those of `{protocol['extractor']}`." if protocol.get("extractor") else ""
    points = (
        " Test images, a Gaussian of the training images' mean and covariance, and uniform noise are reference "
        "points, scored in the same way."
        if source.metrics["reference_points"]
        else ""
    )
    short = "".join(f" **{why}**." for why in protocol.get("why_not", []) if why.startswith("rank-deficient"))
    no_row = (
        "" if source.is_cifar10 else "The paper has no row for these images, so none is beside this run. "
    )
    return f"{no_row}{features}{points}{short}"


def _protocol(protocol: dict[str, Any]) -> list[Block]:
    rows = [(name, plain(protocol[key])) for key, name in PROTOCOL.items() if protocol.get(key) is not None]
    return [Text("How they came about:"), Table((), rows, dense=True)] if rows else []


def plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
