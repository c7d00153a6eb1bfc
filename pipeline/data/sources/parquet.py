"""Encoded images in parquet files, in the layout of the Hugging Face hub.

`data.path` is a file, or a folder whose files at any depth belong to the split that their name, or that of a
folder on the way, begins with: train, and test or else val (`train-*.parquet`, `validation-*.parquet`). Names
that begin with neither are the train split where nothing else is. Without a test split, data.test_images are
held out by a fixed shuffle. The images are the one column of the type struct<bytes: binary, path: string>, or
else the one binary column; `label` holds integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.base import ImageSource
from pipeline.data.sources.raw_image import RawImage
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

LABEL = "label"


class ParquetSource(ImageSource):
    """Rows of parquet files, in the order of the files: a range of them lies in few row groups."""

    def __init__(self, data: DataConfig):
        assert data.path is not None  # DataConfig refuses it
        root, self._labelled = Path(data.path), data.labels > 0
        self.root = root.parent if root.is_file() else root
        self._parts = {"train": [root]} if root.is_file() else _find_split_files(root)
        if "train" not in self._parts:
            raise PipelineError(f"{root} holds no train-*.parquet; set data.path to the folder that does")
        self.files = [file for files in self._parts.values() for file in files]

    def count_images(self) -> dict[str, int]:
        parts = self._parts.items()
        return {part: sum(_open_file(file).metadata.num_rows for file in files) for part, files in parts}

    def read_images(self, part: str, indices: np.ndarray) -> Iterator[RawImage]:
        first = 0
        for file in self._parts[part]:
            opened = _open_file(file)
            count = opened.metadata.num_rows
            yield from self._read_rows(file, opened, _select_rows(indices, first, count))
            first += count

    def _read_rows(self, file: Path, opened: parquet.ParquetFile, rows: np.ndarray) -> Iterator[RawImage]:
        """Yield the images of `rows`, in ascending order, of one file; read only their row groups."""
        column = _find_image_column(opened.schema_arrow, file)
        if self._labelled and LABEL not in opened.schema_arrow.names:
            known = ", ".join(opened.schema_arrow.names)
            raise PipelineError(f"{file} has no column '{LABEL}', only {known}; set data.labels=0")
        columns = [column, LABEL] if self._labelled else [column]
        first = 0
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            here = _select_rows(rows, first, count)
            if len(here):
                with _explain_arrow_errors(file):
                    table = opened.read_row_group(group, columns=columns, use_threads=False)
                    values = table.take(here).to_pylist()
                for row, value in zip(here + first, values, strict=True):
                    image, name = value[column], f"{file} row {row}"
                    if isinstance(image, dict):
                        image, name = image["bytes"], f"{name} ({image.get('path')})"
                    yield RawImage(name, image or b"", value.get(LABEL))
            first += count


def _find_split_files(root: Path) -> dict[str, list[Path]]:
    files = sorted(root.rglob("*.parquet"))

    def find(prefix: str) -> list[Path]:
        return [file for file in files if any(p.startswith(prefix) for p in file.relative_to(root).parts)]

    test = find("test") or find("val")
    parts = {"train": find("train") or [file for file in files if file not in test], "test": test}
    return {part: of_part for part, of_part in parts.items() if of_part}


def _select_rows(rows: np.ndarray, first: int, count: int) -> np.ndarray:
    """Return the rows in [first, first + count), counted from `first`."""
    return rows[(rows >= first) & (rows < first + count)] - first


def _find_image_column(schema: pyarrow.Schema, file: Path) -> str:
    """Return the name of the one column that can hold images."""
    from pyarrow import types

    structs = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binaries = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    columns = structs or binaries
    if len(columns) != 1:
        known = ", ".join(f"{f.name} ({f.type})" for f in schema)
        raise PipelineError(f"{file} has {len(columns)} columns of encoded images, not one: {known}")
    return columns[0]


def _open_file(file: Path) -> parquet.ParquetFile:
    from pyarrow import parquet

    with _explain_arrow_errors(file):
        return parquet.ParquetFile(file)


@contextmanager
def _explain_arrow_errors(file: Path) -> Iterator[None]:
    """Raise Arrow's errors as PipelineError with the file's name."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(f"{file} is no readable parquet file ({reason}); fetch it again") from error
