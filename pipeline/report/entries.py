"""Runs of a comparison: what tells them apart, what they share, and how they are named."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline import config
from pipeline.config.checks import Tree
from pipeline.report.page import PROTOCOL, format_value
from pipeline.report.source import Source
from pipeline.scores.metrics import LOSS
from pipeline.scores.ranking import Group, describe_objective
from pipeline.store import selection
from pipeline.store.run import Place

# What says nothing of a number: names, places, and how often something is kept or shown.
NOT_COMPARED = (
    "name", "data.path", "data.images_per_shard", "published.path", "evaluate.extractor_weights", "figures.",
    "train.checkpoint_every", "train.sample_every", "train.log_every", "train.keep", "evaluate.checkpoint_images",
)  # fmt: skip
IMPLIED = ("rounding", "reference_images")  # always the same, or said by the others
MOST_IN_PLOTS, MOST_LETTERS = 3, 26


@dataclass(frozen=True)
class Entry:
    """One run among several, as one experiment sees it; swept: key -> value of what differs, in order."""

    label: str
    place: Place
    swept: Tree

    def value(self, key: str) -> str:
        """Write what it has for a key that was swept."""
        return format_value(self.swept.get(key))

    @cached_property
    def source(self) -> Source:
        """Its files. A best checkpoint that is not chosen yet has none: there the last one stands."""
        experiment = self.place.experiment
        last = replace(experiment, sample=replace(experiment.sample, checkpoint="last"))
        return Source(selection.fill_in_selection(self.place) or self.place.of(last))

    @property
    def data(self) -> str:
        return f"{self.place.experiment.data.source} {self.place.data_key}"

    @cached_property
    def scores(self) -> dict[str, float]:
        losses = self.source.series("train/loss")[1]
        return {**({LOSS.name: losses[-1]} if losses else {}), **self.source.scores}

    @cached_property
    def objective(self) -> Tree:
        """What makes losses comparable."""
        return {"data": self.data, **describe_objective(self.place.experiment)}

    @cached_property
    def protocol(self) -> Tree:
        return {**self.source.protocol, "objective": describe_objective(self.place.experiment)}


def find_differing(trees: Sequence[Tree]) -> list[str]:
    """List the keys with more than one value in these trees, in order."""
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return [key for key in keys if len({str(tree.get(key)) for tree in trees}) > 1]


def list_entries(places: Iterable[Place]) -> list[Entry]:
    """Name runs by their folders, with whatever differs between their experiments as what is swept."""
    found = [(place, config.flatten(config.to_dict(place.experiment))) for place in places]
    differing = find_differing([tree for _, tree in found])
    keys = [key for key in differing if not key.startswith(NOT_COMPARED)]
    return [
        Entry(place.name, place, {key: tree[key] for key in keys if key in tree}) for place, tree in found
    ]


def find_swept(entries: Sequence[Entry]) -> list[str]:
    """List what was swept and has more than one value among these."""
    return find_differing([entry.swept for entry in entries])


def shorten(key: str) -> str:
    """Return the last part of a dotted key."""
    return key.rpartition(".")[2]


def name_briefly(entries: Sequence[Entry], keys: Sequence[str]) -> dict[str, str]:
    """Map labels to what a plot has room for: the swept values where they tell the entries apart."""
    values = {e.label: " · ".join(map(e.value, keys)) for e in entries}
    if 0 < len(keys) <= MOST_IN_PLOTS and len(set(values.values())) == len(entries):
        return values
    return {
        label: label if len(label) <= MOST_LETTERS else f"…{label[-MOST_LETTERS + 1 :]}" for label in values
    }


def describe_protocol(group: Group[Entry]) -> str:
    """Write what the runs of a group share, as part of a sentence."""
    names = {key: PROTOCOL.get(key, key) for key in group.protocol if key not in IMPLIED}
    return ", ".join(
        f"{name if name[:2].isupper() else name[0].lower() + name[1:]} {format_value(group.protocol[key])}"
        for key, name in names.items()
    )


def differing_protocol(entries: Sequence[Entry]) -> list[str]:
    """List what else of their protocols is not the same for all: it is part of what is compared."""
    differing = set(find_differing([entry.protocol for entry in entries])) - {
        "checkpoint",
        "batch_size",
        "seed",
    }
    return [key for key in PROTOCOL if key in differing]
