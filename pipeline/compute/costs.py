"""What units cost: images, and the seconds of one worker that they took."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from pipeline.store.files import read_json, write_json

OLD_KINDS = {"NLL": "nll"}  # the words that runs of the first version have for them


class Cost(TypedDict):
    images: int
    seconds: float


def read_costs(path: Path) -> dict[str, dict[str, Cost]]:
    """Return the costs on file by kind of unit and by the steps of the sampling chain; empty where there is none."""
    noted = read_json(path) if path.exists() else {}
    return {OLD_KINDS.get(kind, kind): chains for kind, chains in noted.items()}


class CostCounter:
    """Costs by kind of unit since they were last written."""

    def __init__(self) -> None:
        self.by_kind: dict[str, Cost] = {}

    def add(self, kind: str, images: int, seconds: float) -> None:
        cost = self.by_kind.setdefault(str(kind), {"images": 0, "seconds": 0.0})
        cost["images"] += images
        cost["seconds"] += seconds

    def write(self, path: Path, chain: int) -> None:
        """Add the costs to those on file, for a sampling chain of so many steps, and begin again from nothing."""
        noted = read_costs(path)
        for kind, new in self.by_kind.items():
            known = noted.setdefault(kind, {}).setdefault(str(chain), {"images": 0, "seconds": 0.0})
            known["images"] += new["images"]
            known["seconds"] += new["seconds"]
        self.by_kind.clear()
        write_json(path, noted)
