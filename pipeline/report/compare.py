"""A page over several runs: who is best, how they trained, what they draw, in what they differ.

It is made from the runs' files alone, as their own reports are, which it links to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.config import Experiment
from pipeline.console import duration
from pipeline.report import axes, beside_paper, plots
from pipeline.report.leaderboard import Entry, describe_protocol, differing_protocol
from pipeline.report.markdown import to_markdown
from pipeline.report.page import HTML, MARKDOWN, Block, Page, Picture, Pictures, Section, Table, Text
from pipeline.report.scores import PROTOCOL, plain, useless_ones
from pipeline.report.web import to_html
from pipeline.scores.metrics import FIRM, METRICS, Metric
from pipeline.scores.ranking import Group, describe_objective, format_winner, rank_runs
from pipeline.store.files import atomic_directory, write_manifest
from pipeline.store.keys import hash_of
from pipeline.store.run import Place

MOST_COLUMNS = 3  # swept keys that the leaderboard has room for
# What says nothing of a number: names, places, and how often something is kept or shown.
NOT_COMPARED = (
    "name", "data.path", "data.images_per_shard", "published.path", "evaluate.extractor_weights", "figures.",
    "train.checkpoint_every", "train.sample_every", "train.log_every", "train.keep", "evaluate.checkpoint_images",
)  # fmt: skip

__all__ = ["Entry", "entries_of", "place", "write"]


def entries_of(runs: Iterable[tuple[Experiment, Place]]) -> list[Entry]:
    """Runs under their own names, with whatever differs between their experiments as what is swept."""
    found = list(runs)
    flat = [_flat(config.to_dict(experiment)) for experiment, _ in found]
    keys = dict.fromkeys(key for tree in flat for key in tree if not key.startswith(NOT_COMPARED))
    apart = [key for key in keys if len({str(tree.get(key)) for tree in flat}) > 1]
    return [
        Entry(run.path.name, experiment, run, {key: tree[key] for key in apart if key in tree})
        for (experiment, run), tree in zip(found, flat, strict=True)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for key, value in tree.items():
        parts |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return parts


def place(storage: Path, runs: Sequence[Entry], metric: Metric) -> Path:
    """Where the comparison of these runs by this metric is kept."""
    of = sorted((e.run.path.name, config.to_dict(e.source.experiment.sample)["checkpoint"]) for e in runs)
    return storage / "comparisons" / hash_of([of, metric.name])


def write(
    runs: Sequence[Entry], folder: Path, title: str, metric: Metric = METRICS["fid"], note: str = ""
) -> Path:
    """The page as HTML, the path of which is returned, with its Markdown twin and its pictures beside it; `note`
    is said before anything is shown."""
    page = compose(runs, folder, title, metric, note)
    with atomic_directory(folder) as made:
        (made / HTML).write_text(to_html(page), encoding="utf-8")
        (made / MARKDOWN).write_text(to_markdown(page), encoding="utf-8")
        for picture in page.pictures:
            (made / picture.name).write_bytes(picture.data)
        write_manifest(made, [HTML, MARKDOWN, *(picture.name for picture in page.pictures)])
    return folder / HTML


def compose(runs: Sequence[Entry], folder: Path, title: str, metric: Metric, note: str = "") -> Page:
    ranked = rank_runs(runs, metric)
    sections = [
        Section("Leaderboard", _leaderboard(runs, ranked, metric, folder)),
        Section("Beside the paper", beside_paper.together([(e.label, e.source) for e in runs])),
        Section("Scores", _bars(runs)),
        Section("Samples", _samples(runs)),
        Section("Training", _training(runs)),
        Section("What differs", _differences(runs)),
        Section("What was run", [_what_was_run(runs)]),
    ]
    subtitle = f"{len(runs)} runs · ranked by {metric.heading}, the {metric.best} first"
    verdict = f"{useless_ones([entry.source for entry in runs])}**{format_winner(ranked, metric)}**."
    return Page(
        title,
        subtitle,
        verdict,
        [Text(f"{note[0].upper()}{note[1:]}.")] if note else [],
        [s for s in sections if s.blocks],
    )


# The leaderboard


def _leaderboard(
    runs: Sequence[Entry], ranked: Sequence[Group[Entry]], metric: Metric, folder: Path
) -> list[Block]:
    blocks: list[Block] = []
    for group in ranked:
        blocks += [Text(f"Scored alike: {describe_protocol(group)}."), _table(group, metric, folder)]
        blocks += [Text(warning) for warning in _warnings(group)]
    scored = [entry for group in ranked for entry in group.runs]
    left = [f"{_link(entry, folder)}" for entry in runs if entry not in scored]
    return blocks + ([Text(f"Without {metric.heading}: {', '.join(left)}.")] if left else [])


def _table(group: Group[Entry], metric: Metric, folder: Path) -> Table:
    runs = group.runs
    keys = [key for key in _swept(runs) if not _in_labels(runs, key)][:MOST_COLUMNS]
    others = [m for m in METRICS.values() if not m.detail and any(m.name in entry.scores for entry in runs)]
    shown = [metric, *(other for other in others if other.name != metric.name)]
    apart = differing_protocol(runs)
    rows = [
        [
            f"{position.rank}.{FIRM}{_link(entry, folder)}",
            *([metric.format(position.mean, position.spread)] if group.has_seeds else []),
            *(each.format_from(entry.scores) for each in shown),
            *(axes.said(entry.swept.get(key)) for key in keys),
            plain(entry.protocol.get("checkpoint", "–")),
            *(plain(entry.protocol.get(key, "–")) for key in apart),
        ]
        for entry, position in group.ranked
    ]
    names = [
        *([f"{metric.title}, mean of seeds"] if group.has_seeds else []),
        *(each.title for each in shown),
        *map(axes.short, keys),
        "Step",
        *(PROTOCOL[key] for key in apart),
    ]
    return Table(("Run", *names), rows, lead=True)


def _in_labels(entries: Sequence[Entry], key: str) -> bool:
    """Whether the labels say it already, as those of a sweep's trials do."""
    return all(
        axes.said(value) == entry.label or f"{axes.short(key)}={axes.said(value)}" in entry.label
        for entry in entries
        for value in [entry.swept.get(key)]
    )


def _warnings(group: Group[Entry]) -> list[str]:
    short = {
        why for e in group.runs for why in e.protocol.get("why_not", []) if why.startswith("rank-deficient")
    }
    return [f"**{why}**." for why in sorted(short)]


def _link(entry: Entry, folder: Path) -> str:
    """The label, leading to the run's own report where there is one."""
    report = entry.run.report / HTML
    return f"[{entry.label}]({os.path.relpath(report, folder)})" if report.is_file() else entry.label


def _swept(entries: Sequence[Entry]) -> list[str]:
    """Keys with more than one value, in order."""
    keys = dict.fromkeys(key for entry in entries for key in entry.swept)
    return [key for key in keys if len({str(entry.swept.get(key)) for entry in entries}) > 1]


# Pictures


def _bars(runs: Sequence[Entry]) -> list[Block]:
    """FID and NLL of each group that has an order."""
    drawn, names = [], axes.brief(runs, _swept(runs))
    for metric in (METRICS["fid"], METRICS["nll_bpd"]):
        for number, group in enumerate(g for g in rank_runs(runs, metric) if len(g.ranked) > 1):
            values = [(names[entry.label], entry.scores[metric.name]) for entry in group.runs]
            caption = f"{metric.title}, the {metric.best} first: {describe_protocol(group)}"
            drawn.append(plots.ranked(f"bars-{metric.name}-{number}", metric.title, values, caption))
    return [Pictures(drawn)] if drawn else []


def _samples(runs: Sequence[Entry]) -> list[Block]:
    """The sample grids, arranged by what was swept where that is one key or two."""
    shown = [entry for entry in runs if "grid" in entry.source.files]
    if not shown:
        return []
    pictures = {
        entry.label: Picture(f"grid-{number}.png", entry.source.files["grid"].read_bytes(), entry.label)
        for number, entry in enumerate(shown)
    }
    said = "The first samples of each run, not selected, from the same noise where the seed is the same."
    return [Text(said), axes.arranged(shown, pictures, _swept(shown))]


def _training(runs: Sequence[Entry]) -> list[Block]:
    """Loss curves over each other where the objective is the same, else in panels of their own."""
    by_objective: dict[str, list[Entry]] = {}
    once = {entry.run.path: entry for entry in reversed(runs)}.values()  # several entries may share a run
    for entry in reversed(once):
        if entry.source.points:
            by_objective.setdefault(str(_objective(entry)), []).append(entry)
    if not by_objective:
        return []
    names = axes.brief(runs, _swept(runs))
    colours = {entry.label: number for number, entry in enumerate(runs)}
    trees = [_objective(own[0]) for own in by_objective.values()]
    apart = [key for key in trees[0] if len({str(tree.get(key)) for tree in trees}) > 1]
    drawn = []
    for number, own in enumerate(by_objective.values()):
        which = ", ".join(f"{axes.short(key)} {axes.said(_objective(own[0]).get(key))}" for key in apart)
        lines = [
            (names[e.label], colours[e.label], e.source.points)
            for e in sorted(own, key=lambda e: colours[e.label])
        ]
        drawn.append(plots.losses(f"loss-{number}", f"Loss{which and ', ' + which}", lines))
    said = (
        f"The runs have {len(trees)} objectives, and the loss of one cannot be held against that of another: each has "
        "a panel of its own."
        if len(trees) > 1
        else "Loss of all runs, smoothed; they have the same objective."
    )
    return [Text(said), Pictures(drawn)]


def _objective(entry: Entry) -> dict[str, Any]:
    """What makes losses comparable."""
    return {"data": entry.data, **describe_objective(entry.experiment)}


# What differs, and where it was made


def _differences(runs: Sequence[Entry]) -> list[Block]:
    """Every key that has several values, unless labels or leaderboard say them all."""
    keys = _swept(runs)
    if len(keys) <= MOST_COLUMNS:
        return []
    rows = [[f"`{key}`", *(axes.said(entry.swept.get(key)) for entry in runs)] for key in keys]
    return [Table(("", *(entry.label for entry in runs)), rows)]


def _what_was_run(runs: Sequence[Entry]) -> Table:
    rows = []
    for entry in runs:
        made = entry.source.made_with
        seconds = sum(entry.source.timings.values())
        commit = str((entry.source.commits.get("train") or [made.get("commit") or "–"])[-1])
        rows.append(
            [entry.label, f"`{commit[:10]}{'+' * commit.endswith('+')}`", duration(seconds) if seconds else "–",
             str(made.get("hardware") or "–")]
        )  # fmt: skip
    return Table(("Run", "Commit", "Time in all", "Hardware"), rows)
