"""Encoded images in parquet files, in the layout of the Hugging Face hub.

`data.path` is a file, or a folder whose files at any depth belong to the split that their name, or that of a
folder on the way, begins with: train, and test or else val (`train-*.parquet`, `validation-*.parquet`). Names
that begin with neither are the train split where nothing else is. Without a test split, data.test_images are
held out by a fixed shuffle. The images are the one column of the type struct<bytes: binary, path: string>, or
else the one binary column; `label` holds integers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.content import digest_of
from pipeline.data.sources.order import neighbouring
from pipeline.data.sources.picture import Picture
from pipeline.errors import PipelineError

LABEL = "label"
PREFIXES = {"train": ("train",), "test": ("test", "val")}  # the first that there is


class Parquet:
    """Rows in the order of the files, so that a range of them lies in few row groups."""

    def __init__(self, data: DataConfig):
        assert data.path is not None  # DataConfig refuses it
        self._root = Path(data.path)
        self._test_images, self._labelled = data.test_images, data.labels > 0
        self._files = {"train": [self._root]} if self._root.is_file() else _by_split(self._root)
        if "train" not in self._files:
            raise PipelineError(
                f"{self._root} holds no train-*.parquet; set data.path to the folder that does"
            )

    def files(self) -> list[Path]:
        return [file for files in self._files.values() for file in files]

    def digest(self) -> str:
        return digest_of(self.files(), self._root.parent if self._root.is_file() else self._root)

    @cached_property
    def splits(self) -> dict[str, int]:
        return {split: len(rows) for split, (_, rows) in self._order.items()}

    def pictures(self, split: str, start: int, stop: int) -> Iterator[Picture]:
        origin, rows = self._order[split]
        rows, first = rows[start:stop], 0
        for file in self._files[origin]:
            count = _open(file).metadata.num_rows
            yield from self._in_file(file, _within(rows, first, count))
            first += count

    @cached_property
    def _order(self) -> dict[str, tuple[str, np.ndarray]]:
        counts = {
            split: sum(_open(file).metadata.num_rows for file in files)
            for split, files in self._files.items()
        }
        return neighbouring(self._root, counts, self._test_images)

    def _in_file(self, file: Path, rows: np.ndarray) -> Iterator[Picture]:
        """The images of these ascending rows of a file, reading only the row groups that hold them."""
        opened, first = _open(file), 0
        column = _image_column(opened.schema_arrow, file)
        columns = [column, *self._label_column(opened.schema_arrow, file)]
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            here = _within(rows, first, count)
            if len(here):
                with _named(file):
                    table = opened.read_row_group(group, columns=columns, use_threads=False)
                    values = table.take(here).to_pylist()
                for row, value in zip(here + first, values, strict=True):
                    yield _picture(f"{file} row {row}", value[column], value.get(LABEL))
            first += count

    def _label_column(self, schema: Any, file: Path) -> list[str]:
        if self._labelled and LABEL not in schema.names:
            known = ", ".join(schema.names)
            raise PipelineError(f"{file} has no column '{LABEL}', only {known}; set data.labels=0")
        return [LABEL] if self._labelled else []


def _by_split(root: Path) -> dict[str, list[Path]]:
    files = sorted(root.rglob("*.parquet"))
    found = {
        split: next(filter(None, (_beginning(root, files, prefix) for prefix in prefixes)), [])
        for split, prefixes in PREFIXES.items()
    }
    found["train"] = found["train"] or [file for file in files if file not in found["test"]]
    return {split: of_split for split, of_split in found.items() if of_split}


def _beginning(root: Path, files: list[Path], prefix: str) -> list[Path]:
    return [file for file in files if any(p.startswith(prefix) for p in file.relative_to(root).parts)]


def _within(rows: np.ndarray, first: int, count: int) -> np.ndarray:
    """Those of the rows that lie in [first, first + count), counted from `first`."""
    return rows[(rows >= first) & (rows < first + count)] - first


def _image_column(schema: Any, file: Path) -> str:
    from pyarrow import types

    structs = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binaries = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    columns = structs or binaries
    if len(columns) != 1:
        known = ", ".join(f"{f.name} ({f.type})" for f in schema)
        raise PipelineError(f"{file} has {len(columns)} columns of encoded images, not one: {known}")
    return columns[0]


def _picture(name: str, value: Any, label: int | None) -> Picture:
    if isinstance(value, dict):
        return Picture(f"{name} ({value.get('path')})", value["bytes"] or b"", label)
    return Picture(name, value or b"", label)


def _open(file: Path) -> Any:
    import pyarrow.parquet as parquet

    with _named(file):
        return parquet.ParquetFile(file)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Arrow's errors do not say which file they are about."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(f"{file} is no readable parquet file ({reason}); fetch it again") from error
