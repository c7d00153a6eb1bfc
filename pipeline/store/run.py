"""Paths and keys of a run, its data and the storage root. Only `store` names the files that others find."""

import math
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pipeline.config import Experiment, read_provenance
from pipeline.errors import PipelineError
from pipeline.store import keys
from pipeline.store.files import MANIFEST, is_locked, read_json, read_record, write_json

EXPERIMENT, METRICS, SELECTION = "experiment.yaml", "metrics.json", "selection.json"
REPORT_HTML, REPORT_MD, STOP, TRACKING = "report.html", "report.md", ".stop", "tracking.json"
LEADERBOARD, LOG = "leaderboard.json", "log.jsonl"
# The files of a run beside its sealed folders.
RECORD = (EXPERIMENT, LOG, "timings.json", "commits.json", "*.patch", "grids/*.png")
HEARTBEAT, STALLED = ".step", 1800  # seconds
STAGES = ("shard", "train", "select", "sample", "evaluate", "figures", "report")  # in their order


class CostSum(TypedDict):
    images: int
    seconds: float


def _path_property(folder: str, name: str) -> cached_property[Path]:
    return cached_property(lambda place: getattr(place, folder) / name)


def _folder_property(folder: str, key: str) -> cached_property[Path]:
    """Return a property: the folder of the run that is named by one of the place's keys."""
    return cached_property(lambda place: place.path / folder / getattr(place, key))


def _key_property(make_key: Callable[[Experiment, str], str]) -> cached_property[str]:
    """Return a property: a key of the place, computed once."""
    return cached_property(lambda place: make_key(place.experiment, place.run_key))


@dataclass(frozen=True)
class Place:
    """Paths and keys of one run of an experiment below a storage root.

    It is picklable, since every worker gets it, and made once per command, so that each key is hashed once. storage:
    absolute path of the root, shared by all hosts. data_key, run_key: content hashes (`pipeline.store.keys`), so equal
    paths mean equal content. The keys of samples, scores and figures depend on `experiment.sample.checkpoint`.
    """

    storage: Path
    experiment: Experiment
    data_key: str
    run_key: str

    def replace_experiment(self, experiment: Experiment) -> "Place":
        """Return this place with another experiment of the same run: other sample or evaluate settings."""
        return replace(self, experiment=replace(experiment, name=self.experiment.name))

    # Keys

    sample_key = _key_property(keys.make_sample_key)
    score_key = _key_property(keys.make_score_key)
    figures_key = _key_property(keys.make_figures_key)
    selection_key = _key_property(keys.make_selection_key)

    # Folders

    @property
    def name(self) -> str:
        return f"{self.experiment.name}-{self.run_key}"

    @cached_property
    def path(self) -> Path:
        return self.storage / self.name

    @cached_property
    def data(self) -> Path:
        """Folder of the shards, which all runs on them share."""
        return self.storage / "data" / f"{self.experiment.data.source}-{self.data_key}"

    samples = _folder_property("samples", "sample_key")
    scores = _folder_property("evaluation", "score_key")
    selection = _folder_property("selection", "selection_key")
    figures = _folder_property("figures", "figures_key")

    @cached_property
    def optimum(self) -> Path:
        """Folder of the best denoisers' errors, which all runs on the data at the same noise schedule share."""
        d = self.experiment.diffusion
        schedule = keys.hash_content([d.timesteps, d.beta_schedule, d.beta_start, d.beta_end, *d.betas])
        return self.data / "optimum" / f"{d.beta_schedule}-{schedule}"

    def locate_step(self, step: int) -> Path:
        return self.train / f"step_{step:08d}"

    def locate_patch(self, digest: str) -> Path:
        return self.path / f"{digest}.patch"

    def locate_grid(self, step: int) -> Path:
        return self.grids / f"{step:08d}.png"

    # Files and folders with fixed names

    experiment_yaml = _path_property("path", EXPERIMENT)
    commits_json = _path_property("path", "commits.json")
    spent_json = _path_property("path", "spent.json")
    timings_json = _path_property("path", "timings.json")
    tracking_json = _path_property("path", TRACKING)
    log = _path_property("path", LOG)
    stop_file = _path_property("path", STOP)
    heartbeat = _path_property("path", HEARTBEAT)
    failure = _path_property("path", ".failure")
    placement_group = _path_property("path", ".placement-group")
    ray = _path_property("path", "ray")
    worker_logs = _path_property("path", "logs")
    train = _path_property("path", "train")
    grids = _path_property("path", "grids")
    report = _path_property("path", "report")
    report_html = _path_property("report", REPORT_HTML)
    samples_grid = _path_property("samples", "grid.png")
    samples_yaml = _path_property("samples", "sample.yaml")
    score_units = _path_property("path", "evaluation/units")
    metrics_json = _path_property("scores", METRICS)
    nll_json = _path_property("scores", "nll.json")
    evaluate_yaml = _path_property("scores", "evaluate.yaml")
    scores_manifest = _path_property("scores", MANIFEST)
    selection_json = _path_property("selection", SELECTION)
    figure_units = _path_property("path", "figures/units")
    figures_manifest = _path_property("figures", MANIFEST)
    references = _path_property("data", "references")
    reference_features = _path_property("data", "references/features")
    projection = _path_property("data", "projection/projection.safetensors")
    classifier = _path_property("data", "classifier/classifier.safetensors")
    extractor_cache = _path_property("storage", "extractors")
    downloads = _path_property("storage", "data/downloads")
    classifier_json = _path_property("data", "classifier/classifier.json")

    # Records

    @property
    def has_training(self) -> bool:
        return self.train.exists() or self.log.exists()

    def read_provenance(self) -> dict[str, Any]:
        """Return commit, hardware and versions of the last command; empty before the first one."""
        return read_provenance(self.experiment_yaml) if self.experiment_yaml.exists() else {}

    def read_stage_seconds(self) -> dict[str, float]:
        """Return the seconds of each finished stage, over all commands."""
        return read_record(self.timings_json, dict[str, float])

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add seconds that a command worked on a stage."""
        timings = self.read_stage_seconds()
        write_json(self.timings_json, {**timings, stage: timings.get(stage, 0.0) + seconds})

    def add_costs(self, chain: int, spent: Iterable[tuple[str, int, float]]) -> None:
        """Add what units cost (kind, images, worker-seconds), under the number of steps of the sampling chain."""
        costs = read_record(self.spent_json, dict[str, dict[str, CostSum]])
        for kind, images, seconds in spent:
            cost = costs.setdefault(kind, {}).setdefault(str(chain), {"images": 0, "seconds": 0.0})
            cost["images"] += images
            cost["seconds"] += seconds
        write_json(self.spent_json, costs)

    def read_stage_commits(self) -> dict[str, list[str]]:
        """Return the commits that worked on each stage, in order; experiment.yaml names the last one only."""
        return read_record(self.commits_json, dict[str, list[str]])

    def add_commit(self, stage: str, commit: str | None) -> None:
        """Add the commit whose code runs a stage now to the stage's list of commits."""
        commits = self.read_stage_commits()
        if commit is not None and commit not in commits.setdefault(stage, []):
            commits[stage].append(commit)
            write_json(self.commits_json, commits)


# Below a storage root, beside the runs


def locate_fingerprints(storage: Path) -> Path:
    return storage / "data" / "fingerprints.json"


def locate_study(storage: Path, name: str) -> Path:
    """Return the folder of a study: its state, its leaderboard and its page."""
    return storage / "sweeps" / name


def locate_comparison(storage: Path, key: str) -> Path:
    return storage / "comparisons" / key


def list_steps(train: Path, at_most: float = math.inf) -> list[int]:
    """List the steps of the checkpoints in a training folder, ascending, complete or not."""
    names = (re.fullmatch(r"step_(\d+)", path.name) for path in train.glob("step_*"))
    return sorted(step for match in names if match and (step := int(match[1])) <= at_most)


def find_runs(storage: Path, prefix: str = "") -> list[Path]:
    """Return the run directories below the root whose names start with `prefix`, sorted."""
    found = storage.glob(f"*/{EXPERIMENT}")
    return sorted(path.parent for path in found if path.parent.name.startswith(prefix))


def locate_without_data(path: Path, experiment: Experiment) -> Place:
    """Return the place of a run directory whose data may be elsewhere."""
    return Place(path.parent, experiment, data_key="", run_key=path.name.removeprefix(f"{experiment.name}-"))


# Below a run directory, whatever the experiment is


def find_last_change(run: Path) -> float:
    """Return when its records or folders last changed, in Unix seconds."""
    files = [file for pattern in (*RECORD, "*/*", HEARTBEAT) for file in run.glob(pattern)]
    return max(file.stat().st_mtime for file in files if file.exists())


def find_state(run: Path) -> str:
    """Return the run's state: running, stalled (running, no change for STALLED), failed, interrupted, done, partial.

    partial: without a report.
    """
    if is_locked(run):
        return "running" if time.time() - find_last_change(run) < STALLED else "stalled"
    with suppress(PipelineError, KeyError):  # if it is damaged, or not there yet
        status = read_json(run / TRACKING, dict[str, Any])["status"]
        if status != "FINISHED":
            return "failed" if status == "FAILED" else "interrupted"
    return "done" if (run / "report" / REPORT_HTML).exists() else "partial"


def find_sample_facts(run: Path) -> list[Path]:
    """Return one file of facts of each sample set, unfinished ones included."""
    found = (next(folder.glob("[!.]*.json"), None) for folder in run.glob("samples/*"))
    return [file for file in found if file]


def find_sample_manifests(run: Path) -> list[Path]:
    return sorted(run.glob(f"samples/*/{MANIFEST}"))


def find_scores(run: Path) -> list[Path]:
    """Return the files of scores, those of candidates included, sorted."""
    return sorted(run.glob(f"evaluation/*/{METRICS}"))


def find_selections(run: Path) -> list[Path]:
    return sorted(run.glob(f"selection/*/{SELECTION}"))


def find_leaderboards(storage: Path) -> list[Path]:
    return sorted(storage.glob(f"sweeps/*/{LEADERBOARD}"))
