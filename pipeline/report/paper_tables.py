"""The rows of the paper's Tables 1 and 2 with ours among them, and what of a run is not as the paper has it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import config
from pipeline.report import paper
from pipeline.report.page import escape, format_value
from pipeline.report.source import Source
from pipeline.scores.metrics import FIRM, METRICS, Metric

COLUMNS = [METRICS[name] for name in ("fid", "fid_test", "is_mean", "nll_bpd")]


@dataclass(frozen=True)
class OneRun:
    header: list[str]
    rows: list[list[str]]
    has_row: bool
    departures: list[str]


@dataclass(frozen=True)
class SeveralRuns:
    header: list[str]
    rows: list[list[str]]
    why_not: list[str]


def place_run(source: Source) -> OneRun | None:
    """Put this run below the row of its objective; None for images that the paper has no table of."""
    if not source.is_cifar10:
        return None
    own, scores = paper.row_of(source.experiment.diffusion), source.scores
    ours = ["**this run**", *_format_scores(scores)]
    difference = "*difference*" if source.is_comparable else "*difference, across protocols*"
    rows = []
    for row in paper.TABLES_1_AND_2:
        rows.append([row.name, *_format_row(row)])
        if row is own and scores:
            rows += [ours, [difference, *(_subtract(scores, row, metric) for metric in COLUMNS)]]
    if own is None and scores:
        rows.append(ours)
    header = ["", *(metric.title for metric in COLUMNS)]
    return OneRun(header, rows, own is not None, list_departures(source))


def place_runs(runs: Sequence[tuple[str, Source]]) -> SeveralRuns | None:
    """Put labelled runs below their rows; None unless the runs have several of them."""
    own = [(label, s, paper.row_of(s.experiment.diffusion)) for label, s in runs if s.is_cifar10]
    if len({row.name for _, _, row in own if row}) < 2:
        return None
    rows = []
    for row in paper.TABLES_1_AND_2:
        rows.append([row.name, *_format_row(row), "the paper"])
        for label, source, its in own:
            if its is row:
                protocol = "comparable" if source.is_comparable else "not comparable"
                rows.append([f"**{escape(label)}**", *_format_scores(source.scores), protocol])
    why_not = dict.fromkeys(why for _, source, _ in own for why in source.protocol.get("why_not", []))
    return SeveralRuns(["", *(metric.title for metric in COLUMNS), "Protocol"], rows, list(why_not))


def list_departures(source: Source) -> list[str]:
    """List the settings that are not the paper's, whatever the objective, with both values."""
    tree, found = config.to_dict(source.experiment), []
    for name, recipe in paper.RECIPE.items():
        if name == "train" and source.experiment.published.weights:
            continue
        ours = tree[name] if tree[name].get("name") == recipe.get("name") else {"name": tree[name]["name"]}
        found += [
            f"`{name}.{key}` is {format_value(ours[key])}, not {format_value(value)}"
            for key, value in recipe.items()
            if key in ours and ours[key] != value
        ]
    return found


def format_difference(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _format_row(row: paper.Row) -> list[str]:
    return [row.scores.get(metric.name, "–").replace(" ", FIRM) for metric in COLUMNS]


def _format_scores(scores: Mapping[str, float]) -> list[str]:
    return [metric.format_from(scores) for metric in COLUMNS]


def _subtract(scores: Mapping[str, float], row: paper.Row, metric: Metric) -> str:
    """Ours less the paper's; a dash where one is absent."""
    printed = re.search(r"\d+\.\d+", row.scores.get(metric.name, ""))
    if printed is None or metric.name not in scores:
        return "–"
    return format_difference(scores[metric.name] - float(printed[0]), 2)
