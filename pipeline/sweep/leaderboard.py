"""The leaderboard of a sweep, from the files of its trials: ranked rows, for people and for the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.console import duration, format_table
from pipeline.scores.metrics import HEADLINE, LOSS, METRICS
from pipeline.scores.ranking import Group, Position, describe_objective, format_winner, rank_runs
from pipeline.store import selection
from pipeline.store.files import read_json, write_json, write_text
from pipeline.store.log import read_progress
from pipeline.sweep.definition import Sweep
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.trials import Trial

FAILED, STOPPED = "failed", "stopped"
OVER_SEEDS = ", mean of seeds"
DIGITS = {metric.title: metric.digits for metric in METRICS.values()}


@dataclass(frozen=True)
class Row:
    """One trial. scores: of its own evaluation; seconds: that its stages took; position: of its point, None while
    it has no score, or no common order with the others."""

    trial: Trial
    state: str
    reason: str
    step: int
    scores: dict[str, float]
    protocol: dict[str, Any]
    seconds: float
    position: Position | None = None

    @property
    def label(self) -> str:
        return self.trial.label

    @property
    def swept(self) -> dict[str, Any]:
        return self.trial.point.swept

    @property
    def data(self) -> str:
        return f"{self.trial.run.experiment.data.source} {self.trial.run.data_key}"

    @property
    def rank(self) -> int | None:
        return self.position.rank if self.position else None


@dataclass(frozen=True)
class Leaderboard:
    """The trials of a sweep, the best first, then what has no score."""

    sweep: Sweep
    rows: Sequence[Row]
    groups: Sequence[Group[Row]]


def rank_trials(sweep: Sweep, trials: Sequence[Trial], ledger: Ledger) -> Leaderboard:
    """Read what each trial has scored, and put them in order."""
    found = [_read_row(trial, ledger) for trial in trials]
    groups = rank_runs(found, sweep.rank.by)
    ranked = [replace(row, position=its) for group in groups for row, its in group.ranked]
    if len(groups) > 1:
        ranked = [replace(row, position=None) for row in ranked]
    ended = {row.trial.key for row in ranked}
    return Leaderboard(sweep, [*ranked, *(row for row in found if row.trial.key not in ended)], groups)


def _read_row(trial: Trial, ledger: Ledger) -> Row:
    run, entry = trial.run, ledger.of(trial.key)
    scores: dict[str, float] = {}
    protocol: dict[str, Any] = {}
    step, loss = read_progress(run)
    resolved = selection.resolved(trial.experiment, run)
    if entry.state == "finished" and resolved is not None:
        content = read_json(run.of(resolved).metrics_json)
        scores = {key: value for key, value in content["scores"].items() if isinstance(value, (int, float))}
        protocol = content["protocol"] | {"objective": describe_objective(trial.experiment)}
        scores |= {} if loss is None else {LOSS.name: loss}
    return Row(trial, entry.state, entry.reason, step, scores, protocol, sum(run.seconds_by_stage().values()))


# What is shown


def tabulate(board: Leaderboard) -> list[dict[str, Any]]:
    """A mapping for each row, all with the same headings: numbers as numbers, so that they can be sorted."""
    by = board.sweep.rank.by
    columns = [metric for metric in METRICS.values() if metric in HEADLINE or metric.name == by.name]
    columns = [metric for metric in columns if any(metric.name in row.scores for row in board.rows)]
    has_seeds = any(group.has_seeds for group in board.groups)
    table = []
    for row in board.rows:
        cells: dict[str, Any] = {"rank": row.rank, **row.swept}
        cells |= {metric.title: _rounded(row.scores.get(metric.name), metric.digits) for metric in columns}
        if has_seeds:
            mean, spread = (row.position.mean, row.position.spread) if row.position else (None, None)
            cells[f"{by.title}{OVER_SEEDS}"] = _rounded(mean, by.digits)
            cells["std"] = _rounded(spread, by.digits)
        cells["steps"] = row.step
        cells["time"] = duration(row.seconds) if row.seconds else None
        cells["state"] = row.reason if row.state == STOPPED else row.state
        table.append(cells)
    return table


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def to_markdown(board: Leaderboard, note: str = "") -> str:
    """The same for people: who won, the table, its protocol, what failed."""
    lines = [f"**{headline(board)}**", "", *([note, ""] if note else [])]
    cells = tabulate(board)
    if cells:
        lines += [_line(list(cells[0])), _line(["---"] * len(cells[0]))]
        lines += [_line(_texts(row)) for row in cells]
    lines += ["", protocol_line(board), *(f"- {line}" for line in failures(board))]
    return "\n".join(lines).strip() + "\n"


def _texts(row: dict[str, Any]) -> list[str]:
    """The cells for people: nothing for None, and as many digits in each row of a column."""
    digits = {heading: DIGITS.get(heading.removesuffix(OVER_SEEDS)) for heading in row}
    return [
        "" if value is None else f"{value:.{digits[heading]}f}" if digits[heading] else str(value)
        for heading, value in row.items()
    ]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def headline(board: Leaderboard) -> str:
    """Who won, in a line."""
    return format_winner(board.groups, board.sweep.rank.by)


def protocol_line(board: Leaderboard) -> str:
    """How the scores come about; those of one sweep differ in nothing that is not swept."""
    protocol = next((row.protocol for row in board.rows if row.rank), None)
    if protocol is None:
        return ""
    said = []
    if "n" in protocol:
        said.append(f"{protocol['n']:,} samples, {protocol['weights']} weights, {protocol['steps']} steps")
        said.append(f"features of {protocol['extractor']} against {protocol['reference']}")
    if "nll_images" in protocol:
        said.append(f"NLL of {protocol['nll_images']} of {protocol['test_images']} test images")
    if not protocol.get("comparable", True):
        said.append("not comparable with the paper's numbers")
    return "; ".join(said)


def failures(board: Leaderboard) -> list[str]:
    return [f"{row.label} failed: {row.reason}" for row in board.rows if row.state == FAILED]


def to_text(board: Leaderboard, width: int) -> str:
    """The table for a terminal."""
    cells = tabulate(board)
    headings = [heading.rpartition(".")[2] for heading in (cells[0] if cells else ())]
    title = f"{board.sweep.name}: {headline(board)}"
    return format_table(headings, map(_texts, cells), title, width)


def write(board: Leaderboard, folder: Path, note: str = "") -> None:
    """leaderboard.json and leaderboard.md in the sweep's folder."""
    content = {
        "metric": board.sweep.rank.by.name,
        "larger_is_better": board.sweep.rank.by.larger_is_better,
        "protocol": protocol_line(board),
        "note": note,
        "best": asdict(board.rows[0].position) if board.rows and board.rows[0].position else None,
        "trials": [
            {
                "trial": row.trial.key, "label": row.label, "rank": row.rank, "swept": row.swept,
                "state": row.state, "reason": row.reason, "step": row.step, "scores": row.scores,
                "seconds": row.seconds, "run": row.trial.run.path.name,
            }
            for row in board.rows
        ],
    }  # fmt: skip
    write_json(folder / "leaderboard.json", content)
    write_text(folder / "leaderboard.md", to_markdown(board, note))
