"""The files that a report is made of, those that are there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipeline.compute.spent import Cost, read_spent
from pipeline.config import Experiment
from pipeline.report.page import Block, Text
from pipeline.store import keys, selection
from pipeline.store.files import MANIFEST, read_json, sha256_of
from pipeline.store.run import Place


@dataclass(frozen=True)
class Source:
    """The files that a report is made of, those that are there."""

    experiment: Experiment
    run: Place

    @cached_property
    def files(self) -> dict[str, Path]:
        e, run = self.experiment, self.run
        evaluation = run.of(e).scores
        found = {
            "experiment": run.experiment_yaml,
            "log": run.log,
            "data": run.data / MANIFEST,
            "grid": run.of(e).samples_grid,
            "metrics": evaluation / "metrics.json",
            "nll": evaluation / "nll.json",
            "figures": run.of(e).figures_manifest,
            "spent": run.spent_json,
        }
        if e.evaluate.checkpoints:
            found["selection"] = selection.file(e, run)
        found |= {f"grid {path.stem}": path for path in run.grids.glob("[0-9]*.png")}
        return {name: path for name, path in found.items() if path.is_file()}

    def read(self, name: str) -> dict[str, Any]:
        return read_json(self.files[name]) if name in self.files else {}

    @cached_property
    def timings(self) -> dict[str, float]:
        """Seconds by stage; without this stage's own, which is known only after it."""
        return {k: v for k, v in self.run.seconds_by_stage().items() if k != "report"}

    @cached_property
    def commits(self) -> dict[str, list[str]]:
        """Commits by stage; without this stage's own, which says nothing of what it shows."""
        return {k: v for k, v in self.run.commits_by_stage().items() if k != "report"}

    @cached_property
    def spent(self) -> dict[str, dict[str, Cost]]:
        """What units cost, by kind and length of the sampling chain."""
        return read_spent(self.files["spent"]) if "spent" in self.files else {}

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """The last command's commit, versions and hardware, as experiment.yaml has them."""
        tree = yaml.safe_load(self.files["experiment"].read_text()) if "experiment" in self.files else {}
        return tree.get("made_with") or {}

    @cached_property
    def digest(self) -> str:
        hashes = {name: sha256_of(path) for name, path in self.files.items()}
        return keys.hash_of([hashes, self.timings, self.commits])

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


def missing(source: Source, what: str, stage: str) -> list[Block]:
    return [Text(f"{what}: `ddpm {stage} {source.experiment.name}` with the same overrides makes them.")]
