"""Costs of units: images and worker-seconds, by kind of unit and number of steps of the sampling chain."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from pipeline.compute.units import Cost
from pipeline.store.files import read_record, write_json


class CostSum(TypedDict):
    images: int
    seconds: float


def add_costs(path: Path, chain: int, spent: list[Cost]) -> None:
    """Add the costs of units to the file, under the number of steps of the sampling chain; then empty the list."""
    costs = read_record(path, dict[str, dict[str, CostSum]])
    for kind, images, seconds in spent:
        cost = costs.setdefault(kind, {}).setdefault(str(chain), {"images": 0, "seconds": 0.0})
        cost["images"] += images
        cost["seconds"] += seconds
    spent.clear()
    write_json(path, costs)
