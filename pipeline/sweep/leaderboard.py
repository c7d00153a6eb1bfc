"""The leaderboard of a study: trials ranked by the scores in their run directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from pipeline.console import format_duration, format_table
from pipeline.report.compared_run import ComparedRun, shorten_key
from pipeline.scores.metrics import HEADLINE, METRICS
from pipeline.scores.ranking import RankedGroup, RankedPoint, describe_best, rank_runs
from pipeline.store.files import write_json, write_text
from pipeline.store.log import read_progress
from pipeline.store.run import LEADERBOARD
from pipeline.sweep.definition import Sweep, Value, Values
from pipeline.sweep.points import Trial
from pipeline.sweep.trial_states import State, TrialStates


@dataclass(frozen=True)
class RankedTrial(ComparedRun):
    """A trial with its scores. seconds: the time of its stages."""

    key: str
    state: State
    reason: str
    step: int
    seconds: float

    @cached_property
    def scores(self) -> dict[str, float]:
        """Scores and last loss of the trial; empty before it is finished."""
        return super().scores if self.state == "finished" else {}


@dataclass(frozen=True)
class Leaderboard:
    """Trials of a study, the best first, then those without a score.

    positions: by trial; empty where trials were scored by different protocols.
    """

    sweep: Sweep
    rows: Sequence[RankedTrial]
    groups: Sequence[RankedGroup[RankedTrial]]
    positions: Mapping[str, RankedPoint]

    @property
    def best_trial(self) -> RankedTrial | None:
        """The best trial, or None."""
        return self.rows[0] if self.positions else None

    @property
    def headline(self) -> str:
        """The sentence that names the best trial."""
        return describe_best(self.groups, self.sweep.metric)

    @property
    def failures(self) -> list[str]:
        """A line for each failed trial."""
        return [f"{row.label} failed: {row.reason}" for row in self.rows if row.state == "failed"]


def rank_trials(sweep: Sweep, trials: Mapping[str, Trial], states: TrialStates) -> Leaderboard:
    """Read the scores of all trials and rank them."""
    rows = []
    for key, trial in trials.items():
        place, record = trial.place, states.records[key]
        seconds, step = sum(place.read_stage_seconds().values()), read_progress(place)[0]
        identity = (trial.label, place, trial.swept, key)
        rows.append(RankedTrial(*identity, record["state"], record["reason"], step, seconds))
    groups = rank_runs(rows, sweep.metric)
    ranked = {row.key: (row, position) for group in groups for row, position in group.ranked}
    ordered = [row for row, _ in ranked.values()] + [row for row in rows if row.key not in ranked]
    positions = {key: position for key, (_, position) in ranked.items()} if len(groups) == 1 else {}
    return Leaderboard(sweep, ordered, groups, positions)


def make_rows(board: Leaderboard, write: Callable[[float, int], Value] = round) -> list[Values]:
    """Return the leaderboard as rows {heading: cell}.

    `write` makes a cell of a score and its digits: by default a number, so that a column can be sorted.
    """
    metric = board.sweep.metric
    columns = [entry for entry in METRICS.values() if entry in HEADLINE or entry.name == metric.name]
    columns = [entry for entry in columns if any(entry.name in row.scores for row in board.rows)]
    has_seeds = any(group.has_several_seeds for group in board.groups)
    table = []
    for row in board.rows:
        at = board.positions.get(row.key)
        scores = {entry.title: (row.scores.get(entry.name), entry.digits) for entry in columns}
        if has_seeds:
            scores[f"{metric.title}, mean of seeds"] = at.mean if at else None, metric.digits
            scores["std"] = at.spread if at else None, metric.digits
        written = {
            key: None if value is None else write(value, digits) for key, (value, digits) in scores.items()
        }
        ends: Values = {
            "steps": row.step,
            "time": format_duration(row.seconds) if row.seconds else None,
            "state": row.reason if row.state == "stopped" else row.state,
        }
        table.append({"rank": at.rank if at else None, **row.swept, **written, **ends})
    return table


def _format_rows(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows as text."""
    table = make_rows(board, lambda value, digits: f"{value:.{digits}f}")
    rows = [["" if value is None else str(value) for value in cells.values()] for cells in table]
    return list(table[0]) if table else [], rows


def format_markdown(board: Leaderboard) -> str:
    """Return the leaderboard as Markdown: the best trial, the table, the protocol, the failures."""
    headings, rows = _format_rows(board)
    lines = [f"**{board.headline}**", "", *([board.sweep.note, ""] if board.sweep.note else [])]
    for row in [headings, ["---"] * len(headings), *rows] if rows else []:
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
    lines += ["", describe_protocol(board), *(f"- {line}" for line in board.failures)]
    return "\n".join(lines).strip() + "\n"


def describe_protocol(board: Leaderboard) -> str:
    """Return a sentence on the protocol of the best trial; the others differ only in swept values."""
    protocol = board.best_trial.protocol if board.best_trial else {}
    parts = []
    if "n" in protocol:
        parts.append(f"{protocol['n']:,} samples, {protocol['weights']} weights, {protocol['steps']} steps")
        parts.append(f"features of {protocol['extractor']} against {protocol['reference']}")
    if "nll_images" in protocol:
        split = protocol.get("nll_split", "test")
        parts.append(f"NLL of {protocol['nll_images']} of {protocol[f'{split}_images']} {split} images")
    if not protocol.get("comparable", True):
        parts.append("not comparable with the paper's numbers")
    return "; ".join(parts)


def format_text(board: Leaderboard) -> str:
    """Return the leaderboard as a table for a terminal."""
    headings, rows = _format_rows(board)
    return format_table(list(map(shorten_key, headings)), rows, f"{board.sweep.name}: {board.headline}")


def write_leaderboard(board: Leaderboard, folder: Path) -> None:
    """Write leaderboard.json and leaderboard.md into the study's folder."""
    metric, winner, trials = board.sweep.metric, board.best_trial, []
    for row in board.rows:
        position = board.positions.get(row.key)
        facts = {"trial": row.key, "label": row.label, "rank": position.rank if position else None}
        names = ("swept", "state", "reason", "step", "scores", "seconds")
        trials.append({**facts, **{name: getattr(row, name) for name in names}, "run": row.place.name})
    content = {
        "metric": metric.name,
        "larger_is_better": metric.larger_is_better,
        "protocol": describe_protocol(board),
        "note": board.sweep.note,
        "best": asdict(board.positions[winner.key]) if winner else None,
        "trials": trials,
    }
    write_json(folder / LEADERBOARD, content)
    write_text(folder / "leaderboard.md", format_markdown(board))
