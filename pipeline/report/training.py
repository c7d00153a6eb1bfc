"""How training went."""

from __future__ import annotations

import statistics

from pipeline.report import paper, plots
from pipeline.report.page import Block, Picture, Pictures, Table, Text
from pipeline.report.pictures import enlarged
from pipeline.report.source import Source, missing

GRIDS_SHOWN = 4
LADDER_NOTE = (
    " The ladder is that of tqch/ddpm-torch: the same network and recipe, the EMA warmed up, 50,000 samples for each "
    "score. FID falls with the number of samples, so its course can be compared, and its level only at equal n."
)


def section(source: Source) -> list[Block]:
    published = source.experiment.published
    if published.weights:
        return [Text(f"Nothing was trained: the weights are published ones ({published.weights}).")]
    if not source.points:
        return missing(source, "There is no training curve yet", "train")
    last = source.points[-1]["step"]
    batch = source.experiment.train.batch_size
    said = f"{last:,} steps of {batch:,} images, {rate(source):,.0f} images/s (median)."
    blocks: list[Block] = [Text(said), Pictures(plots.training(source.points))]
    grids = _shown_grids(source)
    if grids:
        blocks += [
            Text("EMA samples from the same noise, as training went on:"),
            Pictures(grids, small=len(grids) == 3),
        ]
    return blocks


def rate(source: Source) -> float:
    rates = [point["metrics"].get("train/images_per_second", 0.0) for point in source.points]
    return statistics.median(rates)


def _shown_grids(source: Source) -> list[Picture]:
    """A few of the grids, the first and the last among them."""
    names = sorted(name for name in source.files if name.startswith("grid "))
    last = len(names) - 1
    places = sorted({round(i * last / (GRIDS_SHOWN - 1)) for i in range(GRIDS_SHOWN)}) if names else []
    steps = [int(names[place].split()[1]) for place in places]
    return [
        Picture(f"step-{step}.png", enlarged(source.files[f"grid {step:08d}"]), f"Step {step:,}")
        for step in steps
    ]


def checkpoints(source: Source) -> list[Block]:
    """The score of each checkpoint that was looked at, the best among them, beside the published ladder."""
    found = source.read("selection")
    if not found:
        asked = source.experiment.evaluate.checkpoints
        return missing(source, "The checkpoints are not scored yet", "evaluate") if asked else []
    metric, scores = found["metric"], {row["step"]: row[found["metric"]] for row in found["scores"]}
    name, best = metric.upper(), found["best"]
    ladder = paper.LADDER if source.is_cifar10 and metric == "fid" else {}
    said = (
        f"**Step {best:,} has the best {name}, {scores[best]:,.2f}**, of {len(scores)} checkpoints, each scored on "
        f"{found['n']:,} samples of its {found['weights']} weights against the {found['reference']} split "
        f"(`{found['extractor']}`).{LADDER_NOTE if ladder else ''}"
    )
    columns = {f"{name}, this run": scores, **({f"{name}, published": ladder} if ladder else {})}
    steps = sorted({step for column in columns.values() for step in column})
    rows = [
        [f"{step:,}", *(f"{column[step]:,.2f}" if step in column else "–" for column in columns.values())]
        for step in steps
    ]
    table = Table(("Step", *columns), rows, frozenset({steps.index(best)}))
    return [Text(said), Pictures([plots.selection(scores, best, name, ladder)]), table]
