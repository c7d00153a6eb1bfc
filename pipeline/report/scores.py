"""What a run scored, in a sentence, on cards and in a table, and how its scores came about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report import paper
from pipeline.report.page import format_value
from pipeline.report.source import Source
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


def compare_with_linear(source: Source) -> str:
    """Write both numbers where a network of CIFAR-10 does not beat the best linear denoiser, which needs no
    training; '' where it does, or where nothing says so.

    The line holds for the paper's noise schedule, and its rate for fixedlarge: another variance costs other bits.
    """
    d, scores = source.experiment.diffusion, source.scores
    if not (source.is_cifar10 and paper.has_its_schedule(d) and "rmse" in scores):
        return ""
    lines = {"rmse": "RMSE"}
    if source.protocol.get("nll_variance", d.variance) == "fixedlarge":
        lines = {"rate_bpd": "rate", **lines}
    if all(scores[key] < paper.LMMSE[key] for key in lines):
        return ""
    ours, line = (
        ", ".join(f"{name}{FIRM}{values[key]:.4f}" for key, name in lines.items())
        for values in (scores, paper.LMMSE)
    )
    return f"{ours}, against {line}"


def write_headline(source: Source) -> str:
    """Write the scores, and what they are beside the paper's or a Gaussian's."""
    scores = source.scores
    parts = [
        f"{m.heading}{FIRM}{m.format_from(scores)} {m.unit}".rstrip() for m in HEADLINE if m.name in scores
    ]
    if source.is_comparable:
        row = paper.row_of(source.experiment.diffusion)
        printed = (
            [f"{m.heading} {row.scores[m.name]}" for m in HEADLINE if m.name in row.scores] if row else []
        )
        tail = ", ".join(printed).replace(" ", FIRM) or "which prints no score for this objective"
        return f"{', '.join(parts)}, by the paper's protocol ({tail})"
    gaussian = source.metrics["reference_points"].get("gaussian", {}).get("fid")
    if gaussian and "fid" in scores:
        share = scores["fid"] / gaussian
        times = f"{share:.0%} of" if share < 1 else f"{share:.1f} times"
        parts[0] += f" ({times} a Gaussian's {gaussian:,.1f})"
    reason = ". Not comparable with the paper's row, for the reasons below" if source.is_cifar10 else ""
    return ", ".join(parts) + reason


def list_cards(source: Source) -> list[list[str]]:
    """List name, value, what stands beside it, and whether the paper's can, of each headline score."""
    scores, points = source.scores, source.metrics["reference_points"]
    row = paper.row_of(source.experiment.diffusion) if source.is_cifar10 else None
    badge = "**comparable**" if source.is_comparable else "not comparable" if source.is_cifar10 else ""
    cards = []
    for metric in HEADLINE:
        if metric.name not in scores:
            continue
        notes = [f"paper {row.scores[metric.name]}"] if row and metric.name in row.scores else []
        if not source.is_comparable:
            notes += [
                f"{name} {metric.format_from(points[point])}"
                for name, point in (("test images", "test"), ("Gaussian", "gaussian"))
                if metric.name in points.get(point, {})
            ]
        note = " · ".join(notes) or "upper bound, test images"
        cards.append([metric.title, metric.format_from(scores), note, badge])
    return cards


def tabulate_scores(source: Source) -> tuple[list[str], list[list[str]]]:
    """Header and rows of every score that was asked for, beside those of images that are known."""
    protocol, points = source.protocol, source.metrics["reference_points"]
    names = [name for name in POINTS if name in points]
    columns = [source.scores, *(points[name] for name in names)]
    rows = [
        [metric.title, *(metric.format_from(column) for column in columns)]
        for metric in METRICS.values()
        if not metric.detail and any(metric.name in column for column in columns)
    ]
    if protocol.get("n"):
        rows.append(["Images", f"{protocol['n']:,}", *(f"{points[name]['n']:,}" for name in names)])
    return ["", "**This run**", *(POINTS[name] for name in names)], rows


def list_protocol(protocol: Mapping[str, Any]) -> list[list[str]]:
    return [
        [name, format_value(protocol[key])] for key, name in PROTOCOL.items() if protocol.get(key) is not None
    ]
