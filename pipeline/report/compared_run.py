"""Runs of a comparison: how they differ, what they share, and how they are named."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline import config
from pipeline.config.checks import Tree
from pipeline.report.page import PROTOCOL, format_value
from pipeline.report.run_files import RunFiles
from pipeline.scores.metrics import LOSS, Scores
from pipeline.scores.ranking import RankedGroup, describe_objective
from pipeline.store import selection
from pipeline.store.run import Place

# Names, places, and how often something is kept or shown: none of them moves a number.
NOT_COMPARED = (
    "name", "data.path", "data.images_per_shard", "published.path", "evaluate.extractor_weights", "figures.",
    "train.checkpoint_every", "train.sample_every", "train.log_every", "train.keep", "evaluate.checkpoint_images",
)  # fmt: skip
IMPLIED = ("rounding", "reference_images")  # always equal, or implied by the other keys
MOST_IN_PLOTS, MOST_LETTERS = 3, 26


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison, with its experiment; swept: {key: value} that differ between the runs, in order."""

    label: str
    place: Place
    swept: Tree

    def format_swept_value(self, key: str) -> str:
        """Return the run's value of a swept key as text."""
        return format_value(self.swept.get(key))

    @cached_property
    def files(self) -> RunFiles:
        """The run's files; those of the last checkpoint until the best one is selected."""
        experiment = self.place.experiment
        last = replace(experiment, sample=replace(experiment.sample, checkpoint="last"))
        return RunFiles(selection.fill_in_selection(self.place) or self.place.replace_experiment(last))

    @property
    def data(self) -> str:
        return f"{self.place.experiment.data.source} {self.place.data_key}"

    @cached_property
    def scores(self) -> Scores:
        losses = self.files.read_series("train/loss")[1]
        return {**({LOSS.name: losses[-1]} if losses else {}), **self.files.scores}

    @property
    def image_bounds(self) -> tuple[int, list[float]]:
        return self.place.experiment.seed, self.files.get_content("nll").get("images", [])

    @cached_property
    def objective(self) -> Tree:
        """The settings that must be equal for losses to be comparable."""
        return {"data": self.data, **describe_objective(self.place.experiment)}

    @cached_property
    def protocol(self) -> Tree:
        return {**self.files.protocol, "objective": describe_objective(self.place.experiment)}


def list_differing_settings(trees: Sequence[Tree]) -> list[str]:
    """Return the keys with more than one value among these configurations, in order."""
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return [key for key in keys if len({str(tree.get(key)) for tree in trees}) > 1]


def make_compared_runs(places: Iterable[Place]) -> list[ComparedRun]:
    """Return the runs as ComparedRun, labelled by folder; `swept` holds the settings that differ."""
    found = [(place, config.flatten(config.to_dict(place.experiment))) for place in places]
    differing = list_differing_settings([tree for _, tree in found])
    keys = [key for key in differing if not key.startswith(NOT_COMPARED)]
    return [ComparedRun(place.name, place, {k: tree[k] for k in keys if k in tree}) for place, tree in found]


def find_swept_keys(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the swept keys with more than one value among these runs."""
    return list_differing_settings([run.swept for run in runs])


def shorten_key(key: str) -> str:
    """Return the last part of a dotted key."""
    return key.rpartition(".")[2]


def shorten_labels(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """Map labels to names that fit into a plot: the swept values if these differ between all runs."""
    keys = find_swept_keys(runs)
    values = {run.label: " · ".join(map(run.format_swept_value, keys)) for run in runs}
    if 0 < len(keys) <= MOST_IN_PLOTS and len(set(values.values())) == len(runs):
        return values
    return {
        label: label if len(label) <= MOST_LETTERS else f"…{label[-MOST_LETTERS + 1 :]}" for label in values
    }


def format_shared_protocol(group: RankedGroup[ComparedRun]) -> str:
    """Return the common protocol of a group's runs as part of a sentence."""
    names = {key: PROTOCOL.get(key, key) for key in group.protocol if key not in IMPLIED}
    return ", ".join(
        f"{name if name[:2].isupper() else name[0].lower() + name[1:]} {format_value(group.protocol[key])}"
        for key, name in names.items()
    )
