"""What was swept as the axes of a picture: one key is a row of grids, two are a matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.drawing.charts import Picture
from pipeline.report.entries import MOST_IN_PLOTS, Entry, shorten
from pipeline.report.page import escape, format_value


@dataclass(frozen=True)
class Matrix:
    """Pictures in rows and columns, which are values of `down` and `across`. `rows` are name and cells; captions
    are shown where a picture's place does not say it all."""

    across: str
    down: str
    columns: list[str]
    rows: list[tuple[str, list[list[Picture]]]]
    has_captions: bool


def arrange(
    entries: Sequence[Entry], files: Mapping[str, str], keys: Sequence[str]
) -> list[Picture] | Matrix:
    """Place the file of each label in a matrix where there are two keys or more (of the first two; others stand in
    the captions), else in a row."""
    if len(keys) < 2:
        return [_caption(entry, files, keys) for entry in _sort(entries, keys)]
    across, down, *others = keys
    columns, rows = _list_values(entries, across), _list_values(entries, down)
    cells: dict[tuple[str, str], list[Picture]] = {}
    for entry in _sort(entries, others):
        cell = cells.setdefault((entry.value(down), entry.value(across)), [])
        cell.append(_caption(entry, files, others))
    grid = [(row, [cells.get((row, column), []) for column in columns]) for row in rows]
    return Matrix(shorten(across), shorten(down), columns, grid, has_captions=bool(others))


def _caption(entry: Entry, files: Mapping[str, str], keys: Sequence[str]) -> Picture:
    """Name a picture by the values that its place does not say."""
    words = [f"{shorten(key)} {entry.value(key)}" for key in keys if entry.value(key) != entry.label]
    return Picture(
        files[entry.label], ", ".join(words) if 0 < len(words) <= MOST_IN_PLOTS else escape(entry.label)
    )


def _sort(entries: Sequence[Entry], keys: Sequence[str]) -> list[Entry]:
    orders = {key: _list_values(entries, key) for key in keys}
    return sorted(entries, key=lambda entry: [orders[key].index(entry.value(key)) for key in keys])


def _list_values(entries: Sequence[Entry], key: str) -> list[str]:
    """Each value once: numbers by size, all else in the order of the entries."""
    values = [entry.swept.get(key) for entry in entries]
    numbers = sorted(value for value in values if isinstance(value, int | float))
    return list(dict.fromkeys(map(format_value, numbers if len(numbers) == len(values) else values)))
