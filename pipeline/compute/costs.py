"""Costs of units: images and worker-seconds."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from pipeline.store.files import read_record, write_json

OLD_KINDS = {"NLL": "nll"}  # the words that runs of the first version have for them


class Cost(TypedDict):
    images: int
    seconds: float


Costs = dict[str, dict[str, Cost]]  # by kind of unit, and by the number of steps of the sampling chain


def read_costs(path: Path) -> Costs:
    """Return the costs on file; empty without a file."""
    return {OLD_KINDS.get(kind, kind): chains for kind, chains in read_record(path, Costs).items()}


class CostCounter:
    """Costs by kind of unit since the last write."""

    def __init__(self) -> None:
        self.by_kind: dict[str, Cost] = {}

    def add(self, kind: str, images: int, seconds: float) -> None:
        """Count one unit."""
        _add(self.by_kind, str(kind), images, seconds)

    def write(self, path: Path, chain: int) -> None:
        """Add the costs to the file, for a sampling chain of so many steps, then reset them."""
        costs = read_costs(path)
        for kind, cost in self.by_kind.items():
            _add(costs.setdefault(kind, {}), str(chain), cost["images"], cost["seconds"])
        self.by_kind.clear()
        write_json(path, costs)


def _add(costs: dict[str, Cost], name: str, images: int, seconds: float) -> None:
    cost = costs.setdefault(name, {"images": 0, "seconds": 0.0})
    cost["images"] += images
    cost["seconds"] += seconds
