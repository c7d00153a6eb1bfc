"""Images in LMDB databases, as LSUN is published: every value is an encoded image, its key does not matter.

`data.path` is one database (a folder with data.mdb, or the file itself), or a folder that holds a single
`*train_lmdb`. Its neighbour `*val_lmdb` is the test split; where there is none, data.test_images are held out
by a fixed shuffle. There are no labels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.base import ImageSource
from pipeline.data.sources.raw_image import RawImage
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import lmdb

TRAIN, VAL, CONTENT = "train_lmdb", "val_lmdb", "data.mdb"


class LmdbSource(ImageSource):
    """Images in the order of their keys; the keys stay in memory (40 bytes each in LSUN)."""

    def __init__(self, data: DataConfig):
        assert data.path is not None  # DataConfig refuses it
        if importlib.util.find_spec("lmdb") is None:
            raise PipelineError("data.source=lmdb needs the package lmdb: pip install lmdb")
        self._parts = _find_databases(Path(data.path))
        self.files = list(self._parts.values())
        folder = self._parts["train"].parent
        # The names of LSUN's folders tell its splits apart; any other folder is a place.
        self.root = folder.parent if folder.name.endswith(TRAIN) else folder

    def count_images(self) -> dict[str, int]:
        return {part: _open_database(file).stat()["entries"] for part, file in self._parts.items()}

    def read_images(self, part: str, indices: np.ndarray) -> Iterator[RawImage]:
        file = self._parts[part]
        keys = _list_image_keys(file)
        with _open_database(file).begin() as transaction:
            for key in (keys[i] for i in indices):
                yield RawImage(f"{file} key {key!r}", transaction.get(key) or b"", None)


def _find_databases(root: Path) -> dict[str, Path]:
    """Return the database file of each part."""
    if root.is_file():
        return {"train": root}
    inside = (root / CONTENT).is_file()
    found = [root] if inside else sorted(file.parent for file in root.glob(f"*{TRAIN}/{CONTENT}"))
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found) or "none"
        raise PipelineError(
            f"{root} has no {CONTENT}, nor a single *{TRAIN} ({names}); set data.path to one of them"
        )
    test = found[0].with_name(found[0].name.removesuffix(TRAIN) + VAL)
    both = {"train": found[0] / CONTENT, "test": test / CONTENT}
    return {part: file for part, file in both.items() if file.is_file()}


@cache
def _open_database(file: Path) -> lmdb.Environment:
    """Open the database: once for a process, since LMDB refuses to open a file twice."""
    import lmdb

    try:
        opened = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
    except (lmdb.Error, OSError) as error:
        raise PipelineError(f"{file} is no readable LMDB database ({error}); fetch it again") from error
    whole = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
    if (size := file.stat().st_size) < whole:  # reading beyond its end would kill the process
        opened.close()
        raise PipelineError(f"{file} is cut short ({size} of {whole} bytes); fetch it again")
    return opened


@cache
def _list_image_keys(file: Path) -> list[bytes]:
    with _open_database(file).begin() as transaction:
        return list(transaction.cursor().iternext(keys=True, values=False))
