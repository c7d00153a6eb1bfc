"""The leaderboard of a study: trials ranked by the scores in their run directories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.console import format_duration, format_table
from pipeline.report.compared_run import ComparedRun, shorten_key
from pipeline.scores import ranking
from pipeline.scores.metrics import HEADLINE, METRICS, Scores
from pipeline.store.files import write_json, write_text
from pipeline.store.log import read_progress
from pipeline.store.run import LEADERBOARD
from pipeline.sweep.definition import Sweep, Values
from pipeline.sweep.points import State, Trial, TrialStates


@dataclass(frozen=True)
class RankedTrial(ComparedRun):
    """A trial with its scores. seconds: the time of its stages."""

    key: str
    state: State
    reason: str
    step: int
    seconds: float

    @cached_property
    def scores(self) -> Scores:
        """Scores and last loss of the trial; empty before it is finished."""
        return super().scores if self.state == "finished" else {}


@dataclass(frozen=True)
class Leaderboard:
    """Trials of a study, the best first, then those without a score."""

    sweep: Sweep
    rows: Sequence[RankedTrial]
    groups: Sequence[ranking.RankedGroup[RankedTrial]]

    @property
    def points(self) -> Sequence[ranking.RankedPoint[RankedTrial]]:
        """The ranked rows; empty if trials were scored by different protocols."""
        return self.groups[0].points if len(self.groups) == 1 else ()

    @property
    def best_trial(self) -> RankedTrial | None:
        return self.rows[0] if self.points else None

    @property
    def headline(self) -> str:
        return ranking.describe_best(self.groups, self.sweep.metric)

    @property
    def failures(self) -> list[str]:
        return [f"{row.label} failed: {row.reason}" for row in self.rows if row.state == "failed"]


def rank_trials(sweep: Sweep, trials: Mapping[str, Trial], states: TrialStates) -> Leaderboard:
    rows = []
    for key, trial in trials.items():
        place, record = trial.place, states.records[key]
        seconds, step = sum(place.read_stage_seconds().values()), read_progress(place)[0]
        identity = (trial.label, place, trial.swept, key)
        rows.append(RankedTrial(*identity, record["state"], record["reason"], step, seconds))
    groups = ranking.rank_runs(rows, sweep.metric)
    ordered = [row for group in groups for row in group.runs]
    return Leaderboard(sweep, [*ordered, *(row for row in rows if row not in ordered)], groups)


def make_rows(board: Leaderboard, as_text: bool = False) -> list[Values]:
    """Return the leaderboard as rows {heading: cell}; trials that differ in the seed alone are one row.

    Scores are numbers, so that a column can be sorted, with their errors in columns of their own; or both as text.
    """
    metric = board.sweep.metric
    columns = [entry for entry in METRICS.values() if entry in HEADLINE or entry.name == metric.name]
    columns = [entry for entry in columns if any(entry.name in row.scores for row in board.rows)]
    ranked = [(point, point.runs) for point in board.points]
    in_points = [row for _, runs in ranked for row in runs]
    table = []
    for point, runs in [*ranked, *((None, [row]) for row in board.rows if row not in in_points)]:
        cells: Values = {"rank": point.rank if point else None}
        for key in runs[0].swept:
            values = list(dict.fromkeys(run.swept.get(key) for run in runs))
            cells[key] = values[0] if len(values) == 1 else ", ".join(map(str, values))
        for entry in columns:
            value, error = ranking.summarize_scores(runs, entry)
            if as_text:
                cells[entry.title] = entry.format(value, error) if value is not None else None
            else:
                for heading, number in ((entry.title, value), (f"{entry.title} ±", error)):
                    cells[heading] = number and round(number, entry.digits + 2)
        cells["difference"] = ranking.format_difference(point, metric) if point else None
        seconds = sum(run.seconds for run in runs)
        cells |= {
            "steps": runs[0].step,
            "time": format_duration(seconds) if seconds else None,
            "state": runs[0].reason if runs[0].state == "stopped" else runs[0].state,
        }
        if as_text:
            cells = {key: "" if cell is None else str(cell) for key, cell in cells.items()}
        table.append(cells)
    return table


def format_markdown(board: Leaderboard) -> str:
    """Return the leaderboard as Markdown: the best trial, the table, the protocol, the failures."""
    rows = make_rows(board, as_text=True)
    lines = [f"**{board.headline}**", "", *([board.sweep.note, ""] if board.sweep.note else [])]
    for row in [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []:
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |")
    facts = filter(None, [describe_protocol(board), ranking.explain_ranks(board.points)])
    lines += ["", "; ".join(facts), *(f"- {line}" for line in board.failures)]
    return "\n".join(lines).strip() + "\n"


def describe_protocol(board: Leaderboard) -> str:
    """Return a sentence on the protocol of the best trial; the others differ only in swept values."""
    protocol = board.best_trial.protocol if board.best_trial else {}
    parts: list[str] = []
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
    """Return the leaderboard as a narrow table; the pages have room for what is the same in all rows."""
    rows = make_rows(board, as_text=True)
    kept = [key for key in (rows[0] if rows else ()) if key != "difference"]
    kept = [key for key in kept if key == "rank" or len(rows) == 1 or len({row[key] for row in rows}) > 1]
    names = [shorten_key(heading).partition(",")[0] for heading in kept]
    cells = [[str(row[heading]) for heading in kept] for row in rows]
    return format_table(names, cells, f"{board.sweep.name}: {board.headline}")


def write_leaderboard(board: Leaderboard, folder: Path) -> None:
    metric, trials = board.sweep.metric, []
    ranks = {run.key: point.rank for point in board.points for run in point.runs}
    for row in board.rows:
        facts = {"trial": row.key, "label": row.label, "rank": ranks.get(row.key)}
        names = ("swept", "state", "reason", "step", "scores", "seconds")
        trials.append({**facts, **{name: getattr(row, name) for name in names}, "run": row.place.name})
    best, facts_of_best = board.points[0] if board.points else None, ("rank", "name", "mean", "error")
    content = {
        "metric": metric.name,
        "larger_is_better": metric.larger_is_better,
        "protocol": describe_protocol(board),
        "note": board.sweep.note,
        "best": best and {**{name: getattr(best, name) for name in facts_of_best}, "seeds": len(best.runs)},
        "trials": trials,
    }
    write_json(folder / LEADERBOARD, content)
    write_text(folder / "leaderboard.md", format_markdown(board))
