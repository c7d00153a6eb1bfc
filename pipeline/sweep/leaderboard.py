"""The leaderboard of a sweep, from the files of its trials: ranked rows, for people and for the server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.console import duration
from pipeline.stages import train
from pipeline.store import keys, selection
from pipeline.store.run import read_json, seconds_by_stage, write_json, write_text
from pipeline.sweep.definition import LOSS, Sweep
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.trials import Trial

SHOWN = {  # score: (heading, digits)
    "fid": ("FID", 2), "fid_test": ("FID, test set", 2), "is_mean": ("IS", 2), "is_shuffled_mean": ("IS, shuffled", 2),
    "kid_mean": ("KID", 5), "precision": ("precision", 3), "recall": ("recall", 3), "nll_bpd": ("NLL, bits/dim", 3),
    "rate_bpd": ("rate, bits/dim", 3), "distortion_bpd": ("distortion, bits/dim", 3), "rmse": ("RMSE", 2),
    LOSS: ("training loss", 4),
}  # fmt: skip
ALWAYS = ("fid", "is_mean", "nll_bpd")
FAILED, STOPPED = "failed", "stopped"


@dataclass(frozen=True)
class Row:
    """One trial. rank: of its point, from 1, None while it has no score; scores: of its own evaluation; mean,
    std: of the ranking metric over the seeds of its point; seconds: that its stages took."""

    trial: Trial
    state: str
    reason: str
    step: int
    scores: dict[str, float]
    protocol: dict[str, Any]
    seconds: float
    rank: int | None = None
    mean: float | None = None
    std: float | None = None


def rows(sweep: Sweep, trials: list[Trial], ledger: Ledger) -> list[Row]:
    """The best first, by the mean over the seeds of each point; then what has no score."""
    metric = sweep.rank.metric
    found = [_row(trial, ledger) for trial in trials]
    seeds: dict[str, list[float]] = {}
    for row in found:
        if metric in row.scores:
            seeds.setdefault(_point(row), []).append(row.scores[metric])
    sign = -1 if sweep.rank.larger_is_better else 1
    order = sorted(seeds, key=lambda point: sign * mean(seeds[point]))
    ranks = {point: number for number, point in enumerate(order, 1)}
    ranked = [_ranked(row, ranks, seeds) if metric in row.scores else row for row in found]
    return sorted(ranked, key=lambda row: row.rank or len(found) + 1)


def _row(trial: Trial, ledger: Ledger) -> Row:
    run, entry = trial.run, ledger.of(trial.key)
    scores: dict[str, float] = {}
    protocol: dict[str, Any] = {}
    step, loss = train.progress(run)
    resolved = selection.resolved(trial.experiment, run)
    if entry.state == "finished" and resolved is not None:
        content = read_json(run.evaluation(keys.evaluate_key(resolved, run.run_key)) / "metrics.json")
        scores = {key: value for key, value in content["scores"].items() if isinstance(value, (int, float))}
        protocol = content["protocol"]
        scores |= {} if loss is None else {LOSS: loss}
    seconds = sum(seconds_by_stage(run).values())
    return Row(trial, entry.state, entry.reason, step, scores, protocol, seconds)


def _point(row: Row) -> str:
    return json.dumps({key: value for key, value in row.trial.point.swept.items() if key != "seed"})


def _ranked(row: Row, ranks: dict[str, int], seeds: dict[str, list[float]]) -> Row:
    values = seeds[_point(row)]
    spread = stdev(values) if len(values) > 1 else None
    return Row(**{**row.__dict__, "rank": ranks[_point(row)], "mean": mean(values), "std": spread})


# What is shown


def table(sweep: Sweep, found: list[Row]) -> list[dict[str, Any]]:
    """A mapping for each row, all with the same headings: numbers as numbers, so that they can be sorted."""
    metric = sweep.rank.metric
    scored = [key for key in SHOWN if key in ALWAYS or key == metric]
    scored = [key for key in scored if any(key in row.scores for row in found)]
    seeded = any(row.std is not None for row in found)
    return [_cells(row, scored, metric if seeded else None) for row in found]


def _cells(row: Row, scored: list[str], over_seeds: str | None) -> dict[str, Any]:
    cells = {"rank": row.rank, **row.trial.point.swept}
    for key in scored:
        heading, digits = SHOWN[key]
        cells[heading] = _rounded(row.scores.get(key), digits)
    if over_seeds:
        heading, digits = SHOWN[over_seeds]
        cells[f"{heading}, mean of seeds"] = _rounded(row.mean, digits)
        cells["std"] = _rounded(row.std, digits)
    cells["steps"] = row.step
    cells["time"] = duration(row.seconds) if row.seconds else None
    cells["state"] = row.reason if row.state == STOPPED else row.state
    return cells


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def markdown(sweep: Sweep, found: list[Row], note: str = "") -> str:
    """The same for people: who won, the table, its protocol, what failed."""
    lines = [f"**{headline(sweep, found)}**", "", *([note, ""] if note else [])]
    cells = table(sweep, found)
    if cells:
        lines += [_line(list(cells[0])), _line(["---"] * len(cells[0]))]
        lines += [_line(_texts(row)) for row in cells]
    lines += ["", protocol_line(found), *(f"- {line}" for line in failures(found))]
    return "\n".join(lines).strip() + "\n"


def _texts(row: dict[str, Any]) -> list[str]:
    """The cells for people: nothing for None, and as many digits in each row of a column."""
    digits = dict(SHOWN.values())
    return [
        "" if value is None else f"{value:.{digits[heading]}f}" if heading in digits else str(value)
        for heading, value in row.items()
    ]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def headline(sweep: Sweep, found: list[Row]) -> str:
    """Who won, in a line."""
    if not found or found[0].rank is None:
        return "no trial has a score yet"
    best, (heading, digits) = found[0], SHOWN[sweep.rank.metric]
    value = best.scores[sweep.rank.metric] if best.std is None else best.mean
    ranked = len({row.rank for row in found if row.rank})
    of = "highest" if sweep.rank.larger_is_better else "lowest"
    label = " ".join(
        word for word in best.trial.label.split() if best.std is None or not word.startswith("seed=")
    )
    return f"{label} has the {of} {heading} of {ranked}: {value:.{digits}f}"


def protocol_line(found: list[Row]) -> str:
    """How the scores come about; those of one sweep differ in nothing that is not swept."""
    protocol = next((row.protocol for row in found if row.rank), None)
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


def failures(found: list[Row]) -> list[str]:
    return [f"{row.trial.label} failed: {row.reason}" for row in found if row.state == FAILED]


def text(sweep: Sweep, found: list[Row], width: int) -> str:
    """The table for a terminal."""
    from rich.console import Console
    from rich.table import Table

    cells = table(sweep, found)
    headings = [heading.rpartition(".")[2] for heading in (cells[0] if cells else ())]
    title = f"{sweep.name}: {headline(sweep, found)}"
    shown = Table(*headings, title=title, title_justify="left")
    for row in cells:
        shown.add_row(*_texts(row))
    console = Console(width=width)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().rstrip()


def write(sweep: Sweep, found: list[Row], folder: Path, note: str = "") -> None:
    """leaderboard.json and leaderboard.md in the sweep's folder."""
    content = {
        "metric": sweep.rank.metric,
        "larger_is_better": sweep.rank.larger_is_better,
        "protocol": protocol_line(found),
        "note": note,
        "trials": [
            {
                "trial": row.trial.key, "label": row.trial.label, "rank": row.rank, "swept": row.trial.point.swept,
                "state": row.state, "reason": row.reason, "step": row.step, "scores": row.scores,
                "seconds": row.seconds, "run": row.trial.run.path.name,
            }
            for row in found
        ],
    }  # fmt: skip
    write_json(folder / "leaderboard.json", content)
    write_text(folder / "leaderboard.md", markdown(sweep, found, note))
