"""The runs of a comparison as the ranking and the page see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.config import Experiment
from pipeline.report.scores import PROTOCOL, plain
from pipeline.report.source import Source
from pipeline.scores.metrics import LOSS
from pipeline.scores.ranking import Group, describe_objective
from pipeline.store import selection
from pipeline.store.run import Place

UNSAID = ("rounding", "reference_images")  # always the same, or said by the others


@dataclass(frozen=True)
class Entry:
    """One run among several, as one experiment sees it; swept: key -> value of what differs, in order."""

    label: str
    experiment: Experiment
    run: Place
    swept: dict[str, Any]

    @cached_property
    def source(self) -> Source:
        """Its files. A best checkpoint that is not chosen yet has none: there the last one stands."""
        last = replace(self.experiment, sample=replace(self.experiment.sample, checkpoint="last"))
        return Source(selection.resolved(self.experiment, self.run) or last, self.run)

    @property
    def data(self) -> str:
        return f"{self.run.experiment.data.source} {self.run.data_key}"

    @cached_property
    def scores(self) -> dict[str, float]:
        points = self.source.points
        loss = {LOSS.name: points[-1]["metrics"]["train/loss"]} if points else {}
        return {**loss, **self.source.metrics["scores"]}

    @cached_property
    def protocol(self) -> dict[str, Any]:
        return {**self.source.metrics["protocol"], "objective": describe_objective(self.experiment)}


def describe_protocol(group: Group[Entry]) -> str:
    """What the runs of a group share, in words."""
    shown = {PROTOCOL.get(key, key): value for key, value in group.protocol.items() if key not in UNSAID}
    return ", ".join(f"{_within(name)} {plain(value)}" for name, value in shown.items())


def _within(name: str) -> str:
    """The name in the middle of a sentence; abbreviations stay as they are."""
    return name if name[:2].isupper() else f"{name[0].lower()}{name[1:]}"


def differing_protocol(entries: Sequence[Entry]) -> list[str]:
    """What else of their protocols is not the same for all: it is part of what is compared."""
    apart = [key for key in PROTOCOL if key not in ("checkpoint", "batch_size", "seed")]
    return [key for key in apart if len({str(entry.protocol.get(key)) for entry in entries}) > 1]
