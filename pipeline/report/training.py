"""How training went, and which of its checkpoints is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pipeline.drawing import charts
from pipeline.drawing.charts import Line, Picture
from pipeline.report import paper
from pipeline.report.source import Source
from pipeline.scores.metrics import METRICS

# metric of log.jsonl: name of the file, title, logarithmic, caption
CURVES = {
    "train/loss": ("loss", "Loss", True, "Loss, per window of steps (faint) and smoothed"),
    "train/grad_norm": ("grad-norm", "Gradient norm", True, "Gradient norm before clipping"),
    "train/lr": ("lr", "Learning rate", False, "Learning rate"),
    "train/images_per_second": ("speed", "Images per second", False, "Images per second, all workers"),
}


def draw_curves(source: Source, folder: Path) -> list[Picture]:
    pictures = []
    for metric, (name, title, log, caption) in CURVES.items():
        steps, values = source.series(metric)
        if steps:
            smooth = [Line(steps, values, kind="faint"), Line(steps, charts.smooth(values))]
            lines = [Line(steps, values)] if metric == "train/lr" else smooth
            pictures.append(
                charts.draw(folder, name, charts.curves(title, "step", lines, log_y=log), caption)
            )
    return pictures


class Selection(TypedDict):
    """selection.json, as far as the page shows it; each score is a step and its value of `metric`."""

    metric: str
    best: int
    scores: list[dict[str, float]]


@dataclass(frozen=True)
class Checkpoints:
    name: str
    best: str
    has_ladder: bool
    chart: Picture
    header: list[str]
    rows: list[list[str]]


def describe_checkpoints(source: Source, folder: Path) -> Checkpoints | None:
    """The score of each checkpoint that was looked at, the best among them, beside the published ladder."""
    found: Selection = source.read("selection")
    if not found:
        return None
    metric, best = METRICS[found["metric"]], found["best"]
    scores = {int(row["step"]): row[metric.name] for row in found["scores"]}
    ladder = paper.LADDER if source.is_cifar10 and metric.name == "fid" else {}
    columns = {f"{metric.heading}, this run": scores}
    if ladder:
        columns[f"{metric.heading}, published"] = ladder
    steps = sorted({step for column in columns.values() for step in column})
    rows = [
        [
            f"**{step:,}**" if step == best else f"{step:,}",
            *(metric.format(c.get(step)) for c in columns.values()),
        ]
        for step in steps
    ]
    chart = _draw_selection(scores, best, metric.heading, ladder, folder)
    return Checkpoints(
        metric.heading, metric.format(scores[best]), bool(ladder), chart, ["Step", *columns], rows
    )


def _draw_selection(
    scores: Mapping[int, float], best: int, name: str, ladder: Mapping[int, float], folder: Path
) -> Picture:
    """Draw {step: score} of the checkpoints, the best one ringed, beside the published {step: FID}."""
    lines = [
        Line(list(scores), list(scores.values()), "this run" if ladder else "", "steps"),
        Line([best], [scores[best]], "best", "best"),
    ]
    if ladder:
        lines.append(Line(list(ladder), list(ladder.values()), "published, n = 50,000", "marks"))
    panel = charts.curves(name, "step", lines, log_x=bool(ladder), log_y=bool(ladder))
    caption = f"{name} against training steps" + (", beside the published ladder" if ladder else "")
    return charts.draw(folder, "selection", panel, caption)
