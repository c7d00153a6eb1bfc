"""Encoded images in parquet files, in the layout of the Hugging Face hub.

Files are `train-*.parquet` and `test-*.parquet` at any depth of a folder; an image column is
struct<bytes: binary, path: string>, a label column holds integers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.sources.content import digest_of
from pipeline.sources.picture import Picture


class Parquet:
    def __init__(self, root: Path, image: str, label: str):
        self._root, self._columns = root, [image, label]
        found = {split: sorted(root.rglob(f"{split}-*.parquet")) for split in ("train", "test")}
        self._files = {split: files for split, files in found.items() if files}
        if "train" not in self._files:
            raise PipelineError(f"{root} holds no train-*.parquet; set data.path to the folder that does")

    def files(self) -> list[Path]:
        return [file for files in self._files.values() for file in files]

    def digest(self) -> str:
        return digest_of(self.files(), self._root)

    @cached_property
    def splits(self) -> dict[str, int]:
        return {split: sum(map(self._count, files)) for split, files in self._files.items()}

    def pictures(self, split: str, start: int, stop: int) -> Iterator[Picture]:
        first = 0
        for file in self._files[split]:
            count = self._count(file)
            yield from self._rows(file, max(0, start - first), min(count, stop - first))
            first += count

    def _rows(self, file: Path, start: int, stop: int) -> Iterator[Picture]:
        """Rows [start, stop) of one file, reading only the row groups that hold them."""
        opened, first = self._open(file), 0
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            if first < stop and start < first + count:
                with _named(file):
                    rows = opened.read_row_group(group, columns=self._columns, use_threads=False).to_pylist()
                for row in range(max(start, first), min(stop, first + count)):
                    yield self._picture(file, row, rows[row - first])
            first += count

    def _picture(self, file: Path, row: int, values: dict[str, Any]) -> Picture:
        image, label = (values[column] for column in self._columns)
        image = image or {}
        return Picture(f"{file} row {row} ({image.get('path')})", image.get("bytes") or b"", label)

    def _count(self, file: Path) -> int:
        return self._open(file).metadata.num_rows

    def _open(self, file: Path) -> Any:
        import pyarrow.parquet as parquet

        with _named(file):
            opened = parquet.ParquetFile(file)
        missing = [column for column in self._columns if column not in opened.schema_arrow.names]
        if missing:
            known = ", ".join(opened.schema_arrow.names)
            raise PipelineError(f"{file} has no column '{missing[0]}', only {known}; check data.path")
        return opened


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Arrow's errors do not say which file they are about."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(f"{file} is no readable parquet file ({reason}); fetch it again") from error
