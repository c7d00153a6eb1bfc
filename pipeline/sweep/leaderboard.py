"""The leaderboard of a study, from the files of its trials: ranked rows, for people and for the server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.config.checks import Tree
from pipeline.console import duration, format_table
from pipeline.scores.metrics import HEADLINE, LOSS, METRICS
from pipeline.scores.ranking import Group, Position, describe_objective, format_winner, rank_runs
from pipeline.store import selection
from pipeline.store.files import read_json, write_json, write_text
from pipeline.store.log import read_progress
from pipeline.store.run import LEADERBOARD
from pipeline.sweep.definition import Sweep, Values
from pipeline.sweep.ledger import Ledger, State
from pipeline.sweep.trials import Trial

OVER_SEEDS = ", mean of seeds"
DIGITS = {metric.title: metric.digits for metric in METRICS.values()}


@dataclass(frozen=True)
class RankedTrial(Trial):
    """One trial. scores: of its own evaluation; seconds: that its stages took; position: of its point, None while
    it has no score, or no common order with the others."""

    state: State
    reason: str
    step: int
    scores: dict[str, float]
    protocol: Tree
    seconds: float
    position: Position | None = None

    @property
    def rank(self) -> int | None:
        return self.position.rank if self.position else None


@dataclass(frozen=True)
class Leaderboard:
    """The trials of a study, the best first, then what has no score."""

    sweep: Sweep
    rows: Sequence[RankedTrial]
    groups: Sequence[Group[RankedTrial]]

    @property
    def winner(self) -> RankedTrial | None:
        """The first row, where there is an order."""
        return self.rows[0] if self.rows and self.rows[0].position else None

    @property
    def headline(self) -> str:
        return format_winner(self.groups, self.sweep.rank.by)

    @property
    def failures(self) -> list[str]:
        return [f"{row.label} failed: {row.reason}" for row in self.rows if row.state == "failed"]


def rank_trials(sweep: Sweep, trials: Iterable[Trial], ledger: Ledger) -> Leaderboard:
    """Read what each trial has scored, and put them in order."""
    rows = [_read_row(trial, ledger) for trial in trials]
    groups = rank_runs(rows, sweep.rank.by)
    one = len(groups) == 1
    ranked = [replace(row, position=at if one else None) for group in groups for row, at in group.ranked]
    keys = {row.key for row in ranked}
    return Leaderboard(sweep, [*ranked, *(row for row in rows if row.key not in keys)], groups)


def _read_row(trial: Trial, ledger: Ledger) -> RankedTrial:
    place, record = trial.place, ledger.records[trial.key]
    scores: dict[str, float] = {}
    protocol: Tree = {}
    step, loss = read_progress(place)
    resolved = selection.resolve(place)
    if record.state == "finished" and resolved is not None:
        content = read_json(resolved.metrics_json)
        scores = {key: value for key, value in content["scores"].items() if isinstance(value, (int, float))}
        protocol = content["protocol"] | {"objective": describe_objective(place.experiment)}
        scores |= {} if loss is None else {LOSS.name: loss}
    seconds = sum(place.seconds_by_stage().values())
    identity = (trial.key, trial.label, trial.swept, place)
    return RankedTrial(*identity, record.state, record.reason, step, scores, protocol, seconds)


def tabulate(board: Leaderboard) -> list[Values]:
    """Return a mapping for each row, all with the same headings: numbers as numbers, so that they can be sorted."""
    by = board.sweep.rank.by
    columns = [metric for metric in METRICS.values() if metric in HEADLINE or metric.name == by.name]
    columns = [metric for metric in columns if any(metric.name in row.scores for row in board.rows)]
    has_seeds = any(group.has_seeds for group in board.groups)
    table = []
    for row in board.rows:
        cells: Values = {"rank": row.rank, **row.swept}
        cells |= {metric.title: _round(row.scores.get(metric.name), metric.digits) for metric in columns}
        if has_seeds:
            mean, spread = (row.position.mean, row.position.spread) if row.position else (None, None)
            cells |= {f"{by.title}{OVER_SEEDS}": _round(mean, by.digits), "std": _round(spread, by.digits)}
        cells["steps"] = row.step
        cells["time"] = duration(row.seconds) if row.seconds else None
        cells["state"] = row.reason if row.state == "stopped" else row.state
        table.append(cells)
    return table


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _format_cells(cells: Values) -> list[str]:
    """Return the cells of a row for people: nothing for None, as many digits in each row of a column."""
    digits = {heading: DIGITS.get(heading.removesuffix(OVER_SEEDS)) for heading in cells}
    return [
        "" if value is None else f"{value:.{digits[heading]}f}" if digits[heading] else str(value)
        for heading, value in cells.items()
    ]


def to_markdown(board: Leaderboard) -> str:
    """Say who won, then the table, how the scores came about, what failed."""
    table = tabulate(board)
    rows = [list(table[0]), ["---"] * len(table[0]), *map(_format_cells, table)] if table else []
    lines = [f"**{board.headline}**", "", *([board.sweep.note, ""] if board.sweep.note else [])]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    lines += ["", describe_scores(board), *(f"- {line}" for line in board.failures)]
    return "\n".join(lines).strip() + "\n"


def describe_scores(board: Leaderboard) -> str:
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


def to_text(board: Leaderboard) -> str:
    """Return the table for a terminal."""
    cells = tabulate(board)
    headings = [heading.rpartition(".")[2] for heading in (cells[0] if cells else ())]
    return format_table(headings, map(_format_cells, cells), f"{board.sweep.name}: {board.headline}")


def write(board: Leaderboard, folder: Path) -> None:
    """Write leaderboard.json and leaderboard.md into the study's folder."""
    by, winner = board.sweep.rank.by, board.winner
    content = {
        "metric": by.name,
        "larger_is_better": by.larger_is_better,
        "protocol": describe_scores(board),
        "note": board.sweep.note,
        "best": asdict(winner.position) if winner and winner.position else None,
        "trials": [
            {
                "trial": row.key, "label": row.label, "rank": row.rank, "swept": row.swept,
                "state": row.state, "reason": row.reason, "step": row.step, "scores": row.scores,
                "seconds": row.seconds, "run": row.place.name,
            }
            for row in board.rows
        ],
    }  # fmt: skip
    write_json(folder / LEADERBOARD, content)
    write_text(folder / "leaderboard.md", to_markdown(board))
