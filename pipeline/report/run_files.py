"""The existing files of a run that its page shows."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import Experiment
from pipeline.config.checks import Tree
from pipeline.drawing.charts import Series
from pipeline.drawing.grids import require_picture
from pipeline.report import paper
from pipeline.scores.metrics import Bound, Results, Scores
from pipeline.store import files, keys
from pipeline.store.log import LogPoint, read_points
from pipeline.store.run import Place
from pipeline.store.selection import Selection
from pipeline.store.tars import ShardSetFacts

REFERENCE_POINTS = {
    "samples": "This run, equal n", "test": "Test images", "train": "Training images", "gaussian": "Gaussian",
    "noise": "Noise",
}  # fmt: skip


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's files, read once. A file that is damaged, or not there yet, is empty."""

    place: Place

    @property
    def experiment(self) -> Experiment:
        return self.place.experiment

    @cached_property
    def _results(self) -> dict[str, tuple[Path, Any]]:
        """Path and content of each result, by name, without those that are missing or differ from their seals."""
        place = self.place
        readers: dict[str, tuple[Path, Callable[..., Any], *tuple[type, ...]]] = {
            "data": (place.data / files.MANIFEST, files.read_json, ShardSetFacts),
            "grid": (place.samples_grid, files.require_sealed),
            "metrics": (place.metrics_json, files.read_sealed, Results),
            "nll": (place.nll_json, files.read_sealed, Bound),
            "figures": (place.figures_manifest, files.read_json, files.FiguresManifest),
        }
        if self.experiment.evaluate.checkpoints:
            readers["selection"] = (place.selection_json, files.read_sealed, Selection)
        there = {name: reader for name, reader in readers.items() if reader[0].is_file()}
        found = {
            name: (path, files.try_read(read, path, *shape)) for name, (path, read, *shape) in there.items()
        }
        return {name: (path, content) for name, (path, content) in found.items() if content is not None}

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Paths of the files on the page, by name, without those that are missing or differ from their seals."""
        records = {"experiment": self.place.experiment_yaml, "log": self.place.log}
        found = {name: path for name, path in records.items() if path.is_file()}
        return found | {name: path for name, (path, _) in self._results.items()}

    @cached_property
    def step_grids(self) -> list[Path]:
        """The sample grids of training, by step."""
        found = sorted(self.place.grids.glob("[0-9]*.png"))
        return [path for path in found if files.try_read(require_picture, path)]

    def get_content(self, name: str) -> Any:
        """Return the content of a JSON file; {} if it is not there."""
        return self._results[name][1] if name in self._results else {}

    @cached_property
    def content_hash(self) -> str:
        """The hash of all that the page shows."""
        shown = [*self.paths.items(), *((f"grid {path.stem}", path) for path in self.step_grids)]
        hashes = {name: files.hash_file(path) for name, path in shown}
        return keys.hash_content([hashes, self.seconds_by_stage, self.commits_by_stage])

    @cached_property
    def seconds_by_stage(self) -> dict[str, float]:
        """Seconds by stage, without the report, whose time is known only after it."""
        return {k: v for k, v in self.place.read_stage_seconds().items() if k != "report"}

    @cached_property
    def commits_by_stage(self) -> dict[str, list[str]]:
        """Commits by stage, without the report, which changes nothing that it shows."""
        return {k: v for k, v in self.place.read_stage_commits().items() if k != "report"}

    @cached_property
    def provenance(self) -> Tree:
        """Commit, hardware and versions of the last command."""
        return self.place.read_provenance()

    @cached_property
    def metrics(self) -> Results:
        empty: Results = {"scores": {}, "protocol": {}, "reference_points": {}, "class_shares": []}
        return {**empty, **self.get_content("metrics")}

    @property
    def scores(self) -> Scores:
        return self.metrics["scores"]

    @property
    def protocol(self) -> Tree:
        return {**self.metrics["protocol"]}

    @property
    def score_columns(self) -> dict[str, Scores]:
        """Scores and number of images: of this run, then of the baselines."""
        points = self.metrics["reference_points"]
        known = {name: points[key] for key, name in REFERENCE_POINTS.items() if key in points}
        return {"**This run**": {**self.scores, "n": self.protocol.get("n", 0)}, **known}

    @cached_property
    def points(self) -> list[LogPoint]:
        return read_points(self.place.log)

    def read_series(self, metric: str) -> Series:
        """Return the steps and the values of one metric of training."""
        found = [(p["step"], p["metrics"][metric]) for p in self.points if metric in p["metrics"]]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def step(self) -> int:
        """The step of the checkpoint that was scored, or the last one that was logged; 0 before training."""
        return self.protocol.get("checkpoint") or (self.points[-1]["step"] if self.points else 0)

    @property
    def images_per_second(self) -> float:
        """The median over training; 0 if there is none."""
        return statistics.median(self.read_series("train/images_per_second")[1] or [0.0])

    @property
    def is_cifar10(self) -> bool:
        """True if the images are CIFAR-10's: by their pixels if those were compared, by the source's name if not."""
        official = self.get_content("data").get("official")
        return self.experiment.data.source == "cifar10" if official is None else bool(official)

    @property
    def is_comparable(self) -> bool:
        # An older version judged by the name, not by the pixels.
        return self.protocol.get("official_data") is True and bool(self.protocol.get("comparable"))

    @property
    def paper_row(self) -> paper.PaperRow | None:
        """The row of the paper's Tables 1 and 2 that this run belongs to."""
        return paper.find_paper_row(self.experiment.diffusion) if self.is_cifar10 else None
