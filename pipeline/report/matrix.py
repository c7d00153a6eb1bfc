"""Sample grids arranged by swept values: one key makes a row of pictures, two make a matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.drawing.charts import Picture
from pipeline.report.compared_run import MOST_IN_PLOTS, ComparedRun, shorten_key
from pipeline.report.page import escape_markdown, format_value


@dataclass(frozen=True)
class PictureMatrix:
    """Pictures in rows (name, cells) and columns, each for a value of `row_key` or of `column_key`."""

    column_key: str
    row_key: str
    columns: list[str]
    rows: list[tuple[str, list[list[Picture]]]]
    has_captions: bool


def arrange_pictures(
    runs: Sequence[ComparedRun], files: Mapping[str, str], keys: Sequence[str]
) -> list[Picture] | PictureMatrix:
    """Arrange pictures, given by label, in a matrix by the first two swept keys, or in a list for one key.

    The captions name further keys.
    """

    def list_pictures(runs: Sequence[ComparedRun], keys: Sequence[str]) -> list[Picture]:
        pictures = []
        for run in sorted(
            runs, key=lambda run: [values[key].index(run.format_swept_value(key)) for key in keys]
        ):
            words = [
                f"{shorten_key(k)} {run.format_swept_value(k)}"
                for k in keys
                if run.format_swept_value(k) != run.label
            ]
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
