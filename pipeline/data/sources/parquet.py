"""Encoded images in parquet files, in the layout of the Hugging Face hub.

`data.path` is a file, or a folder with files at any depth. A file's name, or that of a folder on the way to it, says
its split: train, and test or else val (`base.find_split`). Files that say nothing are train if no others are. The
images are the column data.image_column, or else the one of the type struct<bytes: binary, path: string>, or the one
binary column; `label` holds integers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources import base
from pipeline.data.sources.raw_image import RawImage
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

LABEL, KIND = "label", "readable parquet file"
MAX_BYTES = 2**32  # of a row group, which is read in one piece


class ParquetSource(base.ImageSource):
    """Rows of parquet files, in the order of the files, so that a range of them is in few row groups."""

    def __init__(self, data: DataConfig):
        super().__init__(data)
        root, self._parts = self.root, {"train": [self.root], "test": []}
        if root.is_file():
            self.root = root.parent
        else:
            self._parts, self.skipped, self.notes = _find_split_files(root)
        if not self._parts["train"]:
            raise PipelineError(f"{root} holds no train-*.parquet; set data.path to a folder that does")
        self.files = [file for files in self._parts.values() for file in files]
        test = [file.relative_to(root).parts for file in self._parts["test"]]
        if any(not any(part.startswith(("test", "val")) for part in parts) for parts in test):
            self.layout = f"test: {test}"  # an earlier version trained on these images

    def count_images(self) -> dict[str, int]:
        parts = self._parts.items()
        return {p: sum(_open_file(file).metadata.num_rows for file in files) for p, files in parts if files}

    def read_labels(self, part: str) -> np.ndarray | None:
        labels = [found for file in self._parts[part] if (found := _read_labels(file)) is not None]
        return np.concatenate(labels) if len(labels) == len(self._parts[part]) else None

    def read_images(self, part: str, indices: np.ndarray) -> Iterator[RawImage]:
        order = np.argsort(indices, kind="stable")
        if np.any(np.diff(order) < 0):  # row groups are read in their own order
            images = list(self.read_images(part, indices[order]))
            yield from (images[i] for i in np.argsort(order))
            return
        first = 0
        for file in self._parts[part]:
            opened, start = _open_file(file), first
            for group in range(opened.num_row_groups):
                count = opened.metadata.row_group(group).num_rows
                rows = indices[(indices >= first) & (indices < first + count)] - first
                if len(rows):
                    names = [f"{file} row {row}" for row in rows + first - start]
                    yield from self._read_rows(file, opened, group, rows, names)
                first += count

    def _read_rows(
        self, file: Path, opened: parquet.ParquetFile, group: int, rows: np.ndarray, names: list[str]
    ) -> Iterator[RawImage]:
        if (size := opened.metadata.row_group(group).total_byte_size) > MAX_BYTES:
            raise PipelineError(f"{file} has a row group of {size:,} bytes; write it with smaller ones")
        columns = [column := _find_image_column(opened.schema_arrow, file, self.data.image_column)]
        if self.data.labels > 0:
            columns.append(LABEL)
            if LABEL not in opened.schema_arrow.names:
                known = ", ".join(opened.schema_arrow.names)
                raise PipelineError(f"{file} has no column '{LABEL}', only {known}; set data.labels=0")
        with base.translate_parse_errors(file, KIND):
            values = opened.read_row_group(group, columns, use_threads=False).take(rows).to_pylist()
        for name, value in zip(names, values, strict=True):
            image = value[column]
            if isinstance(image, dict):
                image, name = image["bytes"], f"{name} ({image.get('path')})"
            yield RawImage(name, image or b"", value.get(LABEL))


def _find_split_files(root: Path) -> tuple[dict[str, list[Path]], Counter[str], list[str]]:
    """Return the files of each split, the number of skipped ones by kind, and notes for the user."""
    found, skipped = base.list_files(root, lambda file: file.suffix.lower() == ".parquet")
    splits: defaultdict[str, list[Path]] = defaultdict(list)
    sets: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for file in found:
        folders, name = file.relative_to(root).parts[:-1], file.stem
        split = next(filter(None, map(base.find_split, (name, *reversed(folders)))), "")
        splits[split].append(file)
        sets[split].add(tuple(filter(None, map(base.remove_split_words, folders))))
    train, test = "train" if "train" in splits else "", "test" if "test" in splits else "val"
    both = sets[train] | sets[test]
    several = ", ".join("/".join(folders) or "." for folders in sorted(both))
    if train and len(both - {()}) > 1:
        raise PipelineError(f"{root} holds several sets ({several}); set data.path to one of them")
    for split in splits.keys() - {train, test}:
        for file in splits[split]:
            skipped[f"of the {split} split" if split else f"of no split ({file.name})"] += 1
    notes = [f"{several} are read as one set"] if len(sets[train]) > 1 else []
    return {"train": splits[train], "test": splits[test]}, skipped, notes


def _read_labels(file: Path) -> np.ndarray | None:
    """Return the column of the labels, integers (n,); None if there is none."""
    from pyarrow import types

    opened = _open_file(file)
    index = opened.schema_arrow.get_field_index(LABEL)
    if index < 0 or not types.is_integer(opened.schema_arrow.field(index).type):
        return None
    with base.translate_parse_errors(file, KIND):
        column = opened.read([LABEL], use_threads=False)[LABEL].cast("int64")  # -1 is no uint8
        labels: np.ndarray = column.fill_null(-1).to_numpy()
    return labels


def _find_image_column(schema: pyarrow.Schema, file: Path, name: str | None) -> str:
    """Return `name`, or the name of the one column that can hold images."""
    from pyarrow import types

    structs = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binaries = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    columns = [column for column in structs + binaries if column == name] if name else structs or binaries
    if len(columns) != 1:
        known = ", ".join(f"{f.name} ({f.type})" for f in schema)
        wanted = f"no column {name}" if name else f"{len(columns)} columns of encoded images, not one"
        raise PipelineError(f"{file} has {wanted}: {known}; set data.image_column to one")
    return columns[0]


def _open_file(file: Path) -> parquet.ParquetFile:
    from pyarrow import parquet

    with base.translate_parse_errors(file, KIND):
        return parquet.ParquetFile(file)
