"""What was swept as the axes of a picture: one key is a row of grids, two are a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.report.leaderboard import Entry
from pipeline.report.page import Matrix, Picture, Pictures

MOST_IN_PLOTS, MOST_LETTERS = 3, 26


def short(key: str) -> str:
    """The last part of a dotted key."""
    return key.rpartition(".")[2]


def said(value: Any) -> str:
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)


def brief(entries: Sequence[Entry], keys: Sequence[str]) -> dict[str, str]:
    """{label: what a plot has room for}: the swept values where they tell the entries apart, else the label."""
    values = {e.label: " · ".join(said(e.swept.get(key)) for key in keys) for e in entries}
    if 0 < len(keys) <= MOST_IN_PLOTS and len(set(values.values())) == len(entries):
        return values
    return {
        label: label if len(label) <= MOST_LETTERS else f"…{label[-MOST_LETTERS + 1 :]}" for label in values
    }


def arranged(
    entries: Sequence[Entry], pictures: Mapping[str, Picture], keys: Sequence[str]
) -> Pictures | Matrix:
    """A matrix where there are two keys or more (of the first two; others stand in the captions), else a row."""
    if len(keys) < 2:
        return Pictures([_captioned(entry, pictures, keys) for entry in _sorted(entries, keys)])
    across, down, *others = keys
    columns, rows = _values(entries, across), _values(entries, down)
    cells: dict[tuple[int, int], list[Picture]] = {}
    for entry in _sorted(entries, others):
        spot = rows.index(said(entry.swept.get(down))), columns.index(said(entry.swept.get(across)))
        cells.setdefault(spot, []).append(_captioned(entry, pictures, others))
    return Matrix(short(across), short(down), columns, rows, cells, captions=bool(others))


def _captioned(entry: Entry, pictures: Mapping[str, Picture], keys: Sequence[str]) -> Picture:
    """Named by the values that its place does not say."""
    values = {key: said(entry.swept.get(key)) for key in keys}
    words = [f"{short(key)} {value}" for key, value in values.items() if value != entry.label]
    return replace(pictures[entry.label], caption=", ".join(words) or entry.label)


def _sorted(entries: Sequence[Entry], keys: Sequence[str]) -> list[Entry]:
    places = {key: _values(entries, key) for key in keys}
    return sorted(entries, key=lambda e: [places[key].index(said(e.swept.get(key))) for key in keys])


def _values(entries: Sequence[Entry], key: str) -> list[str]:
    """Each value once: numbers by size, all else in the order of the entries."""
    found = [entry.swept.get(key) for entry in entries]
    numbers = [value for value in found if isinstance(value, int | float)]
    return list(dict.fromkeys(map(said, sorted(numbers) if len(numbers) == len(found) else found)))
