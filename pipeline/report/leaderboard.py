"""Runs in order, among those that were scored alike: numbers of different protocols have no common order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.config import Experiment
from pipeline.report.scores import PROTOCOL, SCORES, plain
from pipeline.report.source import Source
from pipeline.store import selection
from pipeline.store.run import Run

IMAGES = ("n", "extractor", "rounding")
AGAINST = (*IMAGES, "reference", "reference_images")
UNSAID = ("rounding", "reference_images")  # always the same, or said by the others
BOUND = ("nll_images", "decoder", "nll_precision")


@dataclass(frozen=True)
class Metric:
    """`score` in metrics.json, whether more of it is better, and what of the protocol must be equal."""

    score: str
    larger: bool
    protocol: tuple[str, ...]

    @property
    def name(self) -> str:
        return SCORES[self.score][0]

    @property
    def better(self) -> str:
        return "larger is better" if self.larger else "smaller is better"


METRICS = {
    "fid": Metric("fid", False, AGAINST),
    "fid_test": Metric("fid_test", False, (*IMAGES, "fid_test_images")),
    "is": Metric("is_mean", True, (*IMAGES, "splits")),
    "is_shuffled": Metric("is_shuffled_mean", True, (*IMAGES, "splits")),
    "kid": Metric("kid_mean", False, (*AGAINST, "kid")),
    "precision": Metric("precision", True, (*AGAINST, "prc")),
    "recall": Metric("recall", True, (*AGAINST, "prc")),
    "nll": Metric("nll_bpd", False, BOUND),
}


@dataclass(frozen=True)
class Entry:
    """One run among several, as one experiment sees it; swept: key -> value of what differs, in order."""

    label: str
    experiment: Experiment
    run: Run
    swept: dict[str, Any]

    @cached_property
    def source(self) -> Source:
        """Its files. A best checkpoint that is not chosen yet has none: there the last one stands."""
        return Source(selection.resolved(self.experiment, self.run) or _last(self.experiment), self.run)

    @property
    def scores(self) -> dict[str, float]:
        return self.source.metrics["scores"]

    @property
    def protocol(self) -> dict[str, Any]:
        return self.source.metrics["protocol"]


def _last(experiment: Experiment) -> Experiment:
    return replace(experiment, sample=replace(experiment.sample, checkpoint="last"))


@dataclass(frozen=True)
class Group:
    """Entries whose score of one metric came about alike, the best first."""

    protocol: dict[str, Any]
    entries: Sequence[Entry]

    @property
    def said(self) -> str:
        """What they share, in words."""
        shown = {PROTOCOL.get(key, key): value for key, value in self.protocol.items() if key not in UNSAID}
        return ", ".join(f"{_within(name)} {plain(value)}" for name, value in shown.items())

    def differing(self) -> list[str]:
        """What else of their protocols is not the same for all: it is part of what is compared."""
        apart = set(PROTOCOL) - {"checkpoint", "batch_size", "seed"}
        return [key for key in PROTOCOL if key in apart and len(_values(self.entries, key)) > 1]


def _within(name: str) -> str:
    """The name in the middle of a sentence; abbreviations stay as they are."""
    return name if name[:2].isupper() else f"{name[0].lower()}{name[1:]}"


def _values(entries: Sequence[Entry], key: str) -> set[str]:
    return {str(entry.protocol.get(key)) for entry in entries}


def groups(entries: Sequence[Entry], metric: Metric) -> list[Group]:
    """The largest group first. Entries without the score are in none."""
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        if metric.score in entry.scores:
            alike.setdefault(_signature(entry, metric), []).append(entry)
    found = [
        Group(_shared(own[0], metric), sorted(own, key=_order(metric)))
        for own in sorted(alike.values(), key=len, reverse=True)
    ]
    return found


def _signature(entry: Entry, metric: Metric) -> tuple[Any, ...]:
    return (entry.run.data_key, *(str(entry.protocol.get(key)) for key in metric.protocol))


def _shared(entry: Entry, metric: Metric) -> dict[str, Any]:
    found = {key: entry.protocol[key] for key in metric.protocol if entry.protocol.get(key) is not None}
    return {"Data": f"{entry.run.source} {entry.run.data_key}", **found}


def _order(metric: Metric) -> Callable[[Entry], tuple[float, str]]:
    sign = -1 if metric.larger else 1
    return lambda entry: (sign * entry.scores[metric.score], entry.label)
