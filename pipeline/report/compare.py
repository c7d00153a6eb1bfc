"""A page over several runs: who is best, how they trained, what they draw, in what they differ.

It is made from the runs' files alone, as their own reports are, which it links to.
"""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipeline.drawing import charts
from pipeline.drawing.charts import Picture
from pipeline.report import axes
from pipeline.report.entries import (
    Entry,
    describe_protocol,
    differing_protocol,
    find_differing,
    find_swept,
    list_entries,
    name_briefly,
    shorten,
)
from pipeline.report.page import PROTOCOL, TEMPLATE, escape, format_value, write_page
from pipeline.report.scores import compare_with_linear
from pipeline.scores.metrics import FIRM, METRICS, Metric
from pipeline.scores.ranking import Group, format_values, format_winner, rank_runs
from pipeline.store.keys import hash_content
from pipeline.store.run import REPORT_HTML

__all__ = ["Entry", "hash_entries", "list_entries", "write_comparison"]

MOST_COLUMNS = 3  # swept keys that the leaderboard has room for


def hash_entries(entries: Sequence[Entry], metric: Metric) -> str:
    """The key of the comparison of these runs by this metric."""
    return hash_content(
        [sorted((e.place.name, e.source.experiment.sample.checkpoint) for e in entries), metric.name]
    )


def write_comparison(
    entries: Sequence[Entry], folder: Path, title: str, metric: Metric = METRICS["fid"], note: str = ""
) -> Path:
    """Write the page and return the path of its HTML; `note` is said before anything is shown."""
    groups, keys = rank_runs(entries, metric), find_swept(entries)
    ranked = [entry for group in groups for entry in group.runs]
    beside_paper = [entry for entry in entries if entry.source.is_cifar10]
    several = len({entry.source.row.name for entry in beside_paper if entry.source.row}) > 1
    render = partial(
        TEMPLATE.get_template("comparison.md").render,
        title=escape(title),
        note=note,
        metric=metric,
        useful=sum(not compare_with_linear(entry.source) for entry in entries),
        winner=escape(format_winner(groups, metric)),
        groups=[
            (describe_protocol(group), tabulate_group(group, metric, folder), list_reasons(group.runs))
            for group in groups
        ],
        unranked=[_link(entry, folder) for entry in entries if entry not in ranked],
        beside_paper=[(entry.label, entry.source) for entry in beside_paper] if several else [],
        why_not=list_reasons(beside_paper),
        entries=entries,
        differences=keys if len(keys) > MOST_COLUMNS else [],
    )

    def write_markdown(pictures: Path) -> str:
        bars, losses = draw_bars(entries, pictures), draw_losses(entries, pictures)
        return render(bars=bars, samples=copy_samples(entries, pictures), losses=losses)

    write_page(folder, write_markdown)
    return folder / REPORT_HTML


def tabulate_group(group: Group[Entry], metric: Metric, folder: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the leaderboard of one group."""
    runs = group.runs
    keys = [key for key in find_swept(runs) if not _is_in_labels(runs, key)][:MOST_COLUMNS]
    others = [m for m in METRICS.values() if not m.detail and any(m.name in entry.scores for entry in runs)]
    metrics = [metric, *(other for other in others if other.name != metric.name)]
    protocol = ["checkpoint", *differing_protocol(runs)]
    header = [
        *([f"{metric.title}, mean of seeds"] if group.has_seeds else []),
        *(each.title for each in metrics),
        *map(shorten, keys),
        *("Step" if key == "checkpoint" else PROTOCOL[key] for key in protocol),
    ]
    rows = [
        [
            f"{position.rank}.{FIRM}{_link(entry, folder)}",
            *([metric.format(position.mean, position.spread)] if group.has_seeds else []),
            *(each.format_from(entry.scores) for each in metrics),
            *map(entry.value, keys),
            *(format_value(entry.protocol.get(key)) for key in protocol),
        ]
        for entry, position in group.ranked
    ]
    return ["Run", f"**{header[0]}**", *header[1:]], rows


def list_reasons(entries: Sequence[Entry]) -> list[str]:
    """List why scores are not comparable with the paper's, each reason once."""
    return list(dict.fromkeys(why for entry in entries for why in entry.protocol.get("why_not", [])))


def _is_in_labels(entries: Sequence[Entry], key: str) -> bool:
    """Whether the labels say it already, as those of a sweep's trials do."""
    return all(f" {format_values({key: entry.swept.get(key)})} " in f" {entry.label} " for entry in entries)


def _link(entry: Entry, folder: Path) -> str:
    """The label, leading to the run's own report where there is one."""
    report, label = entry.place.report_html, escape(entry.label)
    return f"[{label}]({os.path.relpath(report, folder)})" if report.is_file() else label


def draw_bars(entries: Sequence[Entry], folder: Path) -> list[Picture]:
    """Draw FID and NLL of each group that has an order."""
    pictures, names = [], name_briefly(entries, find_swept(entries))
    for metric in (METRICS["fid"], METRICS["nll_bpd"]):
        for number, group in enumerate(g for g in rank_runs(entries, metric) if len(g.ranked) > 1):
            values = [(names[entry.label], entry.scores[metric.name]) for entry in group.runs]
            caption = f"{metric.title}, the {metric.best} first: {describe_protocol(group)}"
            panel = charts.plot_ranking(metric.title, values)
            pictures.append(charts.save_picture(folder, f"bars-{metric.name}-{number}", panel, caption))
    return pictures


def copy_samples(entries: Sequence[Entry], folder: Path) -> list[Picture] | axes.Matrix:
    """Copy the sample grids, arranged by what was swept where that is one key or two."""
    drawn, files = [entry for entry in entries if "grid" in entry.source.files], {}
    for number, entry in enumerate(drawn):
        files[entry.label] = f"grid-{number}.png"
        shutil.copyfile(entry.source.files["grid"], folder / files[entry.label])
    return axes.arrange(drawn, files, find_swept(drawn))


def draw_losses(entries: Sequence[Entry], folder: Path) -> list[Picture]:
    """Draw losses over each other where the objective is the same, else in panels of their own."""
    groups: dict[str, list[tuple[int, Entry]]] = {}
    seen = set()
    for place, entry in enumerate(entries):
        if entry.source.points and entry.place.path not in seen:  # several entries may share a run
            groups.setdefault(str(entry.objective), []).append((place, entry))
            seen.add(entry.place.path)
    keys = find_differing([own[0][1].objective for own in groups.values()])
    names, pictures = name_briefly(entries, find_swept(entries)), []
    for number, own in enumerate(groups.values()):
        objective = own[0][1].objective
        title = ", ".join(["Loss", *(f"{shorten(key)} {format_value(objective.get(key))}" for key in keys)])
        lines = [(names[entry.label], place, entry.source.series("train/loss")) for place, entry in own]
        panel = charts.plot_losses(title, lines)
        pictures.append(charts.save_picture(folder, f"loss-{number}", panel, f"{title}, smoothed"))
    return pictures
