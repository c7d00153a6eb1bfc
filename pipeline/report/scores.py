"""The page in a sentence, the scores, and how they came about."""

from __future__ import annotations

from typing import Any

from pipeline.report import paper
from pipeline.report.page import Block, Card, Table, Text
from pipeline.report.source import Source, missing

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


def verdict(source: Source) -> str:
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


def cards(source: Source) -> list[Card]:
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


def section(source: Source) -> list[Block]:
    if not source.metrics["scores"]:
        return missing(source, "There are no scores yet", "evaluate")
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
