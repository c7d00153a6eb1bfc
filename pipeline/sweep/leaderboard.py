"""The leaderboard of a study, from the files of its trials: ranked rows, for people and for the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from pipeline.console import format_duration, format_table
from pipeline.report.compared_run import ComparedRun
from pipeline.scores.metrics import HEADLINE, METRICS
from pipeline.scores.ranking import RankedGroup, RankedPoint, format_winner, rank_runs
from pipeline.store.files import write_json, write_text
from pipeline.store.log import read_progress
from pipeline.store.run import LEADERBOARD
from pipeline.sweep.definition import Sweep, Value, Values
from pipeline.sweep.ledger import Ledger, State
from pipeline.sweep.points import Trial


@dataclass(frozen=True)
class RankedTrial(ComparedRun):
    """One trial, as an entry of the study's page. seconds: that its stages took."""

    key: str
    state: State
    reason: str
    step: int
    seconds: float

    @cached_property
    def scores(self) -> dict[str, float]:
        """Those of its own evaluation, with the last loss; none before it has finished."""
        return super().scores if self.state == "finished" else {}


@dataclass(frozen=True)
class Leaderboard:
    """The trials of a study, the best first, then what has no score. positions: by trial, where all that have a
    score have a common order."""

    sweep: Sweep
    rows: Sequence[RankedTrial]
    groups: Sequence[RankedGroup[RankedTrial]]
    positions: Mapping[str, RankedPoint]

    @property
    def winner(self) -> RankedTrial | None:
        """The first row, where there is an order."""
        return self.rows[0] if self.positions else None

    @property
    def headline(self) -> str:
        return format_winner(self.groups, self.sweep.metric)

    @property
    def failures(self) -> list[str]:
        return [f"{row.label} failed: {row.reason}" for row in self.rows if row.state == "failed"]


def rank_trials(sweep: Sweep, trials: Mapping[str, Trial], ledger: Ledger) -> Leaderboard:
    """Read what each trial has scored, and put them in order."""
    rows = []
    for key, trial in trials.items():
        place, record = trial.place, ledger.records[key]
        seconds, step = sum(place.read_stage_seconds().values()), read_progress(place)[0]
        identity = (trial.label, place, trial.swept, key)
        rows.append(RankedTrial(*identity, record.state, record.reason, step, seconds))
    groups = rank_runs(rows, sweep.metric)
    ranked = {row.key: (row, position) for group in groups for row, position in group.ranked}
    ordered = [row for row, _ in ranked.values()] + [row for row in rows if row.key not in ranked]
    positions = {key: at for key, (_, at) in ranked.items()} if len(groups) == 1 else {}
    return Leaderboard(sweep, ordered, groups, positions)


def list_cells(board: Leaderboard, write: Callable[[float, int], Value] = round) -> list[Values]:
    """Return a mapping for each row, all with the same headings. `write` makes a cell of a score and its digits: by
    default a number, so that a column can be sorted."""
    by = board.sweep.metric
    columns = [metric for metric in METRICS.values() if metric in HEADLINE or metric.name == by.name]
    columns = [metric for metric in columns if any(metric.name in row.scores for row in board.rows)]
    has_seeds = any(group.has_several_seeds for group in board.groups)
    table = []
    for row in board.rows:
        at = board.positions.get(row.key)
        rank, mean, spread = (at.rank, at.mean, at.spread) if at else (None, None, None)
        scores = {metric.title: (row.scores.get(metric.name), metric.digits) for metric in columns}
        if has_seeds:
            scores[f"{by.title}, mean of seeds"] = mean, by.digits
            scores["std"] = spread, by.digits
        cells: Values = {"rank": rank, **row.swept}
        cells |= {
            key: None if value is None else write(value, digits) for key, (value, digits) in scores.items()
        }
        cells["steps"] = row.step
        cells["time"] = format_duration(row.seconds) if row.seconds else None
        cells["state"] = row.reason if row.state == "stopped" else row.state
        table.append(cells)
    return table


def _list_cells(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows for people: nothing for None, as many digits in each row of a column."""
    table = list_cells(board, lambda value, digits: f"{value:.{digits}f}")
    rows = [["" if value is None else str(value) for value in cells.values()] for cells in table]
    return list(table[0]) if table else [], rows


def format_markdown(board: Leaderboard) -> str:
    """Say who won, then the table, how the scores came about, what failed."""
    headings, rows = _list_cells(board)
    lines = [f"**{board.headline}**", "", *([board.sweep.note, ""] if board.sweep.note else [])]
    for row in [headings, ["---"] * len(headings), *rows] if rows else []:
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
    lines += ["", describe_protocol(board), *(f"- {line}" for line in board.failures)]
    return "\n".join(lines).strip() + "\n"


def describe_protocol(board: Leaderboard) -> str:
    """Say how the scores come about; those of one study differ in nothing that is not swept."""
    protocol = board.winner.protocol if board.winner else {}
    parts = []
    if "n" in protocol:
        parts.append(f"{protocol['n']:,} samples, {protocol['weights']} weights, {protocol['steps']} steps")
        parts.append(f"features of {protocol['extractor']} against {protocol['reference']}")
    if "nll_images" in protocol:
        parts.append(f"NLL of {protocol['nll_images']} of {protocol['test_images']} test images")
    if not protocol.get("comparable", True):
        parts.append("not comparable with the paper's numbers")
    return "; ".join(parts)


def format_text(board: Leaderboard) -> str:
    """Return the table for a terminal."""
    headings, rows = _list_cells(board)
    short = [heading.rpartition(".")[2] for heading in headings]
    return format_table(short, rows, f"{board.sweep.name}: {board.headline}")


def write(board: Leaderboard, folder: Path) -> None:
    """Write leaderboard.json and leaderboard.md into the study's folder."""
    by, winner = board.sweep.metric, board.winner
    content = {
        "metric": by.name,
        "larger_is_better": by.larger_is_better,
        "protocol": describe_protocol(board),
        "note": board.sweep.note,
        "best": asdict(board.positions[winner.key]) if winner else None,
        "trials": [
            {
                "trial": row.key, "label": row.label, "rank": at.rank if at else None, "swept": row.swept,
                "state": row.state, "reason": row.reason, "step": row.step, "scores": row.scores,
                "seconds": row.seconds, "run": row.place.name,
            }
            for row in board.rows
            for at in [board.positions.get(row.key)]
        ],
    }  # fmt: skip
    write_json(folder / LEADERBOARD, content)
    write_text(folder / "leaderboard.md", format_markdown(board))
