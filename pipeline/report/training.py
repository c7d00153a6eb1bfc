"""How training went."""

from __future__ import annotations

import statistics

from pipeline.report import plots
from pipeline.report.page import Block, Picture, Pictures, Text
from pipeline.report.pictures import enlarged
from pipeline.report.source import Source, missing

GRIDS_SHOWN = 4


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
        blocks += [Text("EMA samples from the same noise, as training went on:"), Pictures(grids)]
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
