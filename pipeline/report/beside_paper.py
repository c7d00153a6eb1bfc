"""The rows of the paper's Tables 1 and 2, this run among them, and what of it is not as the paper has it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline import config
from pipeline.report import paper
from pipeline.report.page import Block, Table, Text
from pipeline.report.scores import plain
from pipeline.report.source import Source
from pipeline.scores.metrics import FIRM, METRICS, Metric

COLUMNS = tuple(METRICS[name] for name in ("fid", "fid_test", "is_mean", "nll_bpd"))
KEY = (
    "ε and μ̃ say what the network predicts: the noise, or the posterior mean. A dash in a row of the paper: "
    "not printed, or unstable in training. Which of the two fixed variances its L rows have it does not say."
)


def section(source: Source) -> list[Block]:
    """Nothing for images that the paper has no table of."""
    if not source.is_cifar10:
        return []
    mine, scores = paper.row_of(source.experiment.diffusion), source.metrics["scores"]
    rows: list[list[str]] = []
    strong, soft = set(), set()
    apart = "difference" if source.is_comparable else "difference, across protocols"
    for row in paper.TABLES_1_AND_2:
        rows.append([row.name, *_printed(row)])
        if row is mine and scores:
            strong.add(len(rows))
            soft.add(len(rows) + 1)
            rows += [
                ["this run", *_scored(scores)],
                [apart, *(difference(scores, row, metric) for metric in COLUMNS)],
            ]
    if mine is None and scores:
        strong.add(len(rows))
        rows.append(["this run", *_scored(scores)])
    table = Table(("", *(metric.title for metric in COLUMNS)), rows, frozenset(strong), frozenset(soft))
    no_row = "" if mine else "**The paper has no row for this objective.** "
    return [table, Text(no_row + KEY), Text(_protocol(source)), Text(_recipe(source))]


def together(runs: Sequence[tuple[str, Source]]) -> list[Block]:
    """The paper's rows with the runs of each below it; nothing unless the runs have several of them."""
    mine = {label: paper.row_of(source.experiment.diffusion) for label, source in runs if source.is_cifar10}
    if len({row.name for row in mine.values() if row}) < 2:
        return []
    sources, rows, strong = dict(runs), [], set()
    for row in paper.TABLES_1_AND_2:
        rows.append([row.name, *_printed(row), "the paper"])
        for label in (label for label, its in mine.items() if its is row):
            strong.add(len(rows))
            source = sources[label]
            fair = "comparable" if source.is_comparable else "not comparable"
            rows.append([label, *_scored(source.metrics["scores"]), fair])
    table = Table(("", *(metric.title for metric in COLUMNS), "Protocol"), rows, frozenset(strong))
    reasons = dict.fromkeys(
        why for label in mine for why in sources[label].metrics["protocol"].get("why_not", [])
    )
    return [table, Text(KEY), *([Text(f"**Why not comparable**: {'; '.join(reasons)}.")] if reasons else [])]


def _printed(row: paper.Row) -> list[str]:
    return [row.scores.get(metric.name, "–").replace(" ", FIRM) for metric in COLUMNS]


def _scored(scores: dict[str, float]) -> list[str]:
    return [metric.format_from(scores) for metric in COLUMNS]


def difference(scores: dict[str, float], row: paper.Row, metric: Metric) -> str:
    """Ours less the paper's, signed; a dash where one is absent."""
    printed = re.search(r"\d+\.\d+", row.scores.get(metric.name, ""))
    if printed is None or scores.get(metric.name) is None:
        return "–"
    return signed(scores[metric.name] - float(printed[0]), 2)


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _protocol(source: Source) -> str:
    if not source.metrics["scores"]:
        return "There are no scores to put beside it yet."
    if source.is_comparable:
        return "**Comparable with the paper**: the protocol of the scores is the paper's."
    reasons = "; ".join(source.metrics["protocol"].get("why_not") or ["the protocol differs"])
    return f"**Not comparable with the paper**: {reasons}."


def _recipe(source: Source) -> str:
    found = "; ".join(departures(source))
    if source.experiment.published.weights:
        return f"**The weights are published ones**, so their training is not known here{found and '; ' + found}."
    return (
        f"**Trained otherwise than in the paper**: {found}."
        if found
        else "**Trained by the paper's recipe.**"
    )


def departures(source: Source) -> list[str]:
    """Settings that are not the paper's, whatever the objective, with both values."""
    tree, found = config.to_dict(source.experiment), []
    for name, recipe in paper.RECIPE.items():
        if name == "train" and source.experiment.published.weights:
            continue
        ours = tree[name] if tree[name].get("name") == recipe.get("name") else {"name": tree[name]["name"]}
        found += [
            f"`{name}.{key}` is {_said(ours[key])}, not {_said(value)}"
            for key, value in recipe.items()
            if key in ours and ours[key] != value
        ]
    return found


def _said(value: Any) -> str:
    """As it stands in a configuration, but with the thousands apart."""
    return str(value).lower() if isinstance(value, bool) else plain(value)
