"""The name of every artefact: where a run, its data and a storage root keep what. No other room spells a file name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.config import Experiment
from pipeline.store import keys
from pipeline.store.files import MANIFEST, read_json, write_json

EXPERIMENT, METRICS, SELECTION = "experiment.yaml", "metrics.json", "selection.json"
LEADERBOARD = "leaderboard.json"
STAGES = ("shard", "train", "select", "sample", "evaluate", "figures", "report")  # in their order


@dataclass(frozen=True)
class Place:
    """One run of an experiment below a storage root: every path and every key of it.

    Plain and picklable, since it travels to every worker; made once per command, so each key is hashed once. storage:
    absolute path of the root, shared by all hosts. data_key, run_key: content hashes (`pipeline.store.keys`), so equal
    paths mean equal content. The keys of samples, scores and figures depend on `experiment.sample.checkpoint`.
    """

    storage: Path
    experiment: Experiment
    data_key: str
    run_key: str

    def of(self, experiment: Experiment) -> Place:
        """Return the same run, asked for another checkpoint, other weights or other scores."""
        return replace(self, experiment=replace(experiment, name=self.experiment.name))

    # Keys

    @cached_property
    def sample_key(self) -> str:
        return keys.sample_key(self.experiment, self.run_key)

    @cached_property
    def score_key(self) -> str:
        return keys.evaluate_key(self.experiment, self.run_key)

    @cached_property
    def figures_key(self) -> str:
        return keys.figures_key(self.experiment, self.run_key)

    @cached_property
    def selection_key(self) -> str:
        return keys.selection_key(self.experiment, self.run_key)

    # The run's folder

    @property
    def name(self) -> str:
        return f"{self.experiment.name}-{self.run_key}"

    @cached_property
    def path(self) -> Path:
        return self.storage / self.name

    @property
    def experiment_yaml(self) -> Path:
        return self.path / EXPERIMENT

    @property
    def commits_json(self) -> Path:
        return self.path / "commits.json"

    @property
    def spent_json(self) -> Path:
        return self.path / "spent.json"

    @property
    def timings_json(self) -> Path:
        return self.path / "timings.json"

    @property
    def tracking_json(self) -> Path:
        return self.path / "tracking.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def stop_file(self) -> Path:
        return self.path / ".stop"

    @property
    def heartbeat(self) -> Path:
        return self.path / ".step"

    @property
    def failure(self) -> Path:
        return self.path / ".failure"

    @property
    def placement_group(self) -> Path:
        return self.path / ".placement-group"

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    # Training

    @property
    def train(self) -> Path:
        return self.path / "train"

    def step_folder(self, step: int) -> Path:
        return self.train / f"step_{step:08d}"

    @property
    def grids(self) -> Path:
        return self.path / "grids"

    def grid(self, step: int) -> Path:
        return self.grids / f"{step:08d}.png"

    # Samples, scores, figures, the report

    @property
    def samples(self) -> Path:
        return self.path / "samples" / self.sample_key

    @property
    def samples_grid(self) -> Path:
        return self.samples / "grid.png"

    @property
    def samples_yaml(self) -> Path:
        return self.samples / "sample.yaml"

    @property
    def score_units(self) -> Path:
        return self.path / "evaluation" / "units"

    @property
    def scores(self) -> Path:
        return self.path / "evaluation" / self.score_key

    @property
    def metrics_json(self) -> Path:
        return self.scores / METRICS

    @property
    def nll_json(self) -> Path:
        return self.scores / "nll.json"

    @property
    def evaluate_yaml(self) -> Path:
        return self.scores / "evaluate.yaml"

    @property
    def scores_manifest(self) -> Path:
        return self.scores / MANIFEST

    @property
    def selection(self) -> Path:
        return self.path / "selection" / self.selection_key

    @property
    def selection_json(self) -> Path:
        return self.selection / SELECTION

    @property
    def figure_units(self) -> Path:
        return self.path / "figures" / "units"

    @property
    def figures(self) -> Path:
        return self.path / "figures" / self.figures_key

    @property
    def figures_manifest(self) -> Path:
        return self.figures / MANIFEST

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def report_html(self) -> Path:
        return self.report / "report.html"

    # The data, shared by all runs on it

    @property
    def data(self) -> Path:
        return self.storage / "data" / f"{self.experiment.data.source}-{self.data_key}"

    @property
    def references(self) -> Path:
        return self.data / "references"

    @property
    def reference_features(self) -> Path:
        return self.references / "features"

    @property
    def classifier(self) -> Path:
        return self.data / "classifier" / "classifier.safetensors"

    @property
    def classifier_json(self) -> Path:
        return self.data / "classifier" / "classifier.json"

    @property
    def projection(self) -> Path:
        return self.data / "projection" / "projection.safetensors"

    @property
    def inception_cache(self) -> Path:
        return self.storage / "extractors"

    # Records

    def seconds_by_stage(self) -> dict[str, float]:
        """Read how long each stage took, over all commands that worked on it; one that never ended is not there."""
        return read_json(self.timings_json) if self.timings_json.exists() else {}

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add the seconds that one command worked on a stage."""
        timings = self.seconds_by_stage()
        write_json(self.timings_json, {**timings, stage: timings.get(stage, 0.0) + seconds})

    def commits_by_stage(self) -> dict[str, list[str]]:
        """Read the commits of the code that worked on each stage, in order; experiment.yaml names the last one only."""
        return read_json(self.commits_json) if self.commits_json.exists() else {}

    def add_commit(self, stage: str, commit: str | None) -> None:
        """Record the code that begins on a stage; training may go on with other code than it began with."""
        commits = self.commits_by_stage()
        if commit is not None and commit not in commits.setdefault(stage, []):
            commits[stage].append(commit)
            write_json(self.commits_json, commits)


# Below a storage root, beside the runs


def downloads(storage: Path) -> Path:
    """Return where downloaded archives are kept."""
    return storage / "data" / "downloads"


def fingerprints_json(storage: Path) -> Path:
    """Return where the fingerprints of data sources are remembered."""
    return storage / "data" / "fingerprints.json"


def sweep_folder(storage: Path, name: str) -> Path:
    """Return where a study keeps its state, its leaderboard and its page."""
    return storage / "sweeps" / name


def comparison_folder(storage: Path, key: str) -> Path:
    """Return where the comparison of several runs is kept."""
    return storage / "comparisons" / key


def find_runs(storage: Path, beginning: str = "") -> list[Path]:
    """List the run directories below the root whose names begin so, sorted."""
    found = storage.glob(f"*/{EXPERIMENT}")
    return sorted(path.parent for path in found if path.parent.name.startswith(beginning))


# Below a run directory, whatever the experiment is


def find_sample_manifests(run: Path) -> list[Path]:
    """List the manifests of finished sample sets, sorted."""
    return sorted(run.glob(f"samples/*/{MANIFEST}"))


def find_scores(run: Path) -> list[Path]:
    """List the files of scores, those of candidates included, sorted."""
    return sorted(run.glob(f"evaluation/*/{METRICS}"))


def find_selections(run: Path) -> list[Path]:
    """List the files that say which checkpoint was chosen, sorted."""
    return sorted(run.glob(f"selection/*/{SELECTION}"))


def find_leaderboards(storage: Path) -> list[Path]:
    """List the leaderboards of all studies below the root, sorted."""
    return sorted(storage.glob(f"sweeps/*/{LEADERBOARD}"))
