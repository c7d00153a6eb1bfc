"""A page over several runs: which is best, how they trained, what they draw, how they differ.

It is made from the runs' files alone, as their own reports are, which it links to.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.drawing import charts
from pipeline.drawing.charts import Line, Picture, save_picture
from pipeline.report.compared_run import (
    MOST_IN_PLOTS,
    ComparedRun,
    find_swept_keys,
    format_shared_protocol,
    list_differing_settings,
    shorten_key,
    shorten_labels,
)
from pipeline.report.page import PROTOCOL, TEMPLATE, escape_markdown, format_value, write_page
from pipeline.report.run_page import compare_with_linear_denoiser
from pipeline.scores import ranking
from pipeline.scores.metrics import FIRM, METRICS, Metric
from pipeline.store.keys import hash_content
from pipeline.store.run import REPORT_HTML

MOST_COLUMNS = 3  # the most swept keys in a leaderboard


@dataclass(frozen=True)
class PictureMatrix:
    """Pictures in rows (name, cells) and columns, each for a value of `row_key` or of `column_key`."""

    column_key: str
    row_key: str
    columns: list[str]
    rows: list[tuple[str, list[list[Picture]]]]
    has_captions: bool


def make_comparison_key(runs: Sequence[ComparedRun], metric: Metric) -> str:
    """Return the key of the comparison of these runs by this metric."""
    names = sorted((run.place.name, run.files.experiment.sample.checkpoint) for run in runs)
    return hash_content([names, metric.name])


def write_comparison(
    runs: Sequence[ComparedRun], folder: Path, title: str, metric: Metric = METRICS["fid"], note: str = ""
) -> Path:
    """Write the page and return the path of its HTML; `note` comes before all tables and pictures."""
    groups, keys = ranking.rank_runs(runs, metric), find_swept_keys(runs)
    ranked = [run for group in groups for run in group.runs]
    of_cifar10 = [run for run in runs if run.files.is_cifar10]
    rows = {run.files.paper_row.name for run in of_cifar10 if run.files.paper_row}

    def compose(pictures: Path) -> str:
        return TEMPLATE.get_template("comparison.md").render(
            title=escape_markdown(title),
            note=note,
            metric=metric,
            useless=sum(bool(compare_with_linear_denoiser(run.files)) for run in runs),
            winner=escape_markdown(ranking.describe_best(groups, metric)),
            groups=[
                (
                    format_shared_protocol(group),
                    tabulate_group(group, metric, folder),
                    ranking.explain_ranks(group.points),
                    list_incomparable_reasons(group.runs),
                )
                for group in groups
            ],
            unranked=[_format_link(run, folder) for run in runs if run not in ranked],
            beside_paper=[(run.label, run.files) for run in of_cifar10] if len(rows) > 1 else [],
            why_not=list_incomparable_reasons(of_cifar10),
            runs=runs,
            differences=keys if len(keys) > MOST_COLUMNS else [],
            samples=copy_sample_grids(runs, pictures),
            scores=draw_scores(groups, metric, pictures),
            losses=draw_losses(runs, pictures),
        )

    write_page(folder, compose)
    return folder / REPORT_HTML


def tabulate_group(
    group: ranking.RankedGroup[ComparedRun], metric: Metric, folder: Path
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the leaderboard of one group."""
    runs = group.runs

    def is_in_labels(key: str) -> bool:  # as what was swept is in those of a sweep's trials
        return all(
            f" {ranking.format_swept_values({key: run.swept.get(key)})} " in f" {run.label} " for run in runs
        )

    keys = [key for key in find_swept_keys(runs) if not is_in_labels(key)][:MOST_COLUMNS]
    others = [m for m in METRICS.values() if not m.detail and any(m.name in run.scores for run in runs)]
    metrics = [metric, *(other for other in others if other.name != metric.name)]
    # the sampler may differ within a group: it is a part of the comparison
    differing = set(list_differing_settings([run.protocol for run in runs])) - {
        "checkpoint",
        "batch_size",
        "seed",
    }
    protocol = {"checkpoint": "Step", **{key: name for key, name in PROTOCOL.items() if key in differing}}
    header = [*(each.title for each in metrics), "difference", *map(shorten_key, keys), *protocol.values()]
    rows = [
        [
            f"{point.rank}.{FIRM}" + ", ".join(_format_link(run, folder) for run in point.runs),
            *(each.format(*ranking.summarize_scores(point.runs, each)) for each in metrics),
            ranking.format_difference(point, metric),
            *(", ".join(dict.fromkeys(run.format_swept_value(key) for run in point.runs)) for key in keys),
            *(format_value(point.runs[0].protocol.get(key)) for key in protocol),
        ]
        for point in group.points
    ]
    return ["Run", f"**{header[0]}**", *header[1:]], rows


def list_incomparable_reasons(runs: Sequence[ComparedRun]) -> list[str]:
    """List why scores are not comparable with the paper's, each reason once."""
    return list(dict.fromkeys(why for run in runs for why in run.protocol.get("why_not", [])))


def _format_link(run: ComparedRun, folder: Path) -> str:
    """Return the label, as a link to the run's own report if there is one."""
    report, label = run.place.report_html, escape_markdown(run.label)
    return f"[{label}]({os.path.relpath(report, folder)})" if report.is_file() else label


def copy_sample_grids(runs: Sequence[ComparedRun], folder: Path) -> list[Picture] | PictureMatrix:
    """Copy the sample grids, arranged by the swept values."""
    sampled, names = [run for run in runs if "grid" in run.files.paths], {}
    for number, run in enumerate(sampled):
        names[run.label] = f"grid-{number}.png"
        shutil.copyfile(run.files.paths["grid"], folder / names[run.label])
    return arrange_pictures(sampled, names, find_swept_keys(sampled))


def arrange_pictures(
    runs: Sequence[ComparedRun], files: Mapping[str, str], keys: Sequence[str]
) -> list[Picture] | PictureMatrix:
    """Arrange pictures, given by label, in a matrix by the first two swept keys, or in a list for one key.

    The captions name further keys.
    """

    def list_pictures(runs: Sequence[ComparedRun], keys: Sequence[str]) -> list[Picture]:
        pictures = []
        for run in sorted(runs, key=lambda r: [values[key].index(r.format_swept_value(key)) for key in keys]):
            texts = {shorten_key(key): run.format_swept_value(key) for key in keys}
            words = [f"{key} {text}" for key, text in texts.items() if text != run.label]
            caption = ", ".join(words) if 0 < len(words) <= MOST_IN_PLOTS else escape_markdown(run.label)
            pictures.append(Picture(files[run.label], caption))
        return pictures

    values = {key: _list_values(runs, key) for key in keys}
    if len(keys) < 2:
        return list_pictures(runs, keys)
    column_key, row_key, *others = keys
    cells: dict[tuple[str, str], list[ComparedRun]] = {}
    for run in runs:
        cell = run.format_swept_value(row_key), run.format_swept_value(column_key)
        cells.setdefault(cell, []).append(run)
    rows = [
        (row, [list_pictures(cells.get((row, column), []), others) for column in values[column_key]])
        for row in values[row_key]
    ]
    return PictureMatrix(
        shorten_key(column_key), shorten_key(row_key), values[column_key], rows, bool(others)
    )


def _list_values(runs: Sequence[ComparedRun], key: str) -> list[str]:
    """List each value once: numbers by size, other values in the order of the runs."""
    values = [run.swept.get(key) for run in runs]
    numbers = sorted(value for value in values if isinstance(value, int | float))
    return list(dict.fromkeys(map(format_value, numbers if len(numbers) == len(values) else values)))


def draw_scores(
    groups: Sequence[ranking.RankedGroup[ComparedRun]], metric: Metric, folder: Path
) -> list[Picture]:
    """Draw the scores of each group against the swept number with the most values, if there are three or more.

    A line holds points that differ in nothing else but the seed.
    """
    pictures: list[Picture] = []
    for group in groups:
        swept = [ranking.drop_seed(point.runs[0]) for point in group.points]
        counts = {
            key: len({values[key] for values in swept})
            for key in find_swept_keys(group.runs)
            if all(type(values.get(key)) in (int, float) for values in swept)
        }
        if max(counts.values(), default=0) < 3:
            continue
        key = max(counts, key=counts.__getitem__)
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for point, values in zip(group.points, swept, strict=True):
            label = ranking.format_swept_values({k: v for k, v in values.items() if k != key})
            lines.setdefault(label, []).append((values[key], point.mean, point.error or 0.0))
        columns = {label: list(zip(*sorted(points), strict=True)) for label, points in lines.items()}
        drawn = [
            Line(x, y, label, number, np.array(error))
            for number, (label, (x, y, error)) in enumerate(columns.items())
        ]
        numbers = [values[key] for values in swept]
        log_x = 0 < 8 * min(numbers) <= max(numbers)
        caption = (
            f"{metric.title} against {shorten_key(key)}; a bar is one standard error, or the spread of seeds"
        )
        panel = charts.Panel(metric.title, shorten_key(key), drawn, log_x)
        pictures.append(save_picture(folder, f"scores-{len(pictures)}", panel, caption))
    return pictures


def draw_losses(runs: Sequence[ComparedRun], folder: Path) -> list[Picture]:
    """Draw the losses of all runs, one panel for each objective."""
    groups: dict[str, dict[Path, tuple[int, ComparedRun]]] = {}
    for number, run in enumerate(runs):
        if run.files.points:  # several compared runs may share a directory: its loss is one curve
            groups.setdefault(str(run.objective), {}).setdefault(run.place.path, (number, run))
    objectives = [next(iter(group.values()))[1].objective for group in groups.values()]
    keys, names, pictures = list_differing_settings(objectives), shorten_labels(runs), []
    for panel, (objective, group) in enumerate(zip(objectives, groups.values(), strict=True)):
        values = [f"{shorten_key(key)} {format_value(objective.get(key))}" for key in keys]
        title = ", ".join(["Loss", *values])
        series = [(number, run.label, *run.files.read_series("train/loss")) for number, run in group.values()]
        lines = [Line(x, charts.smooth(y), names[label], number) for number, label, x, y in series]
        picture = charts.Panel(title, "step", lines, log_y=True)
        pictures.append(save_picture(folder, f"loss-{panel}", picture, f"{title}, smoothed"))
    return pictures
