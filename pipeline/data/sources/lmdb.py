"""Images in LMDB databases, as LSUN is published: every value is an encoded image, its key does not matter.

`data.path` is one database (a folder with data.mdb, or the file itself), or a folder that holds a single one whose
name says train (`church_outdoor_train_lmdb`). Its neighbour of that name with test or else val is the test split.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.base import ImageSource, find_split, remove_split_words, translate_parse_errors
from pipeline.data.sources.raw_image import RawImage
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import lmdb

CONTENT, KIND = "data.mdb", "readable LMDB database"


class LmdbSource(ImageSource):
    """Images in the order of their keys, all of which only the process that plans the shards holds in memory."""

    def __init__(self, data: DataConfig):
        super().__init__(data)
        if importlib.util.find_spec("lmdb") is None:
            raise PipelineError("data.source=lmdb needs the package lmdb: pip install lmdb")
        self._parts, beside = _find_databases(self.root)
        self.skipped = dict.fromkeys((f"database {folder.name}" for folder in beside), 1)
        self.files = list(self._parts.values())
        folder = self._parts["train"].parent
        # LSUN's folder names are its splits, so the fingerprint includes them; names of other folders do not count.
        self.root = folder.parent if "test" in self._parts or folder.name.endswith("train_lmdb") else folder

    def count_images(self) -> dict[str, int]:
        return {part: _open_database(file).stat()["entries"] for part, file in self._parts.items()}

    def locate_images(self, part: str, indices: np.ndarray) -> list[bytes]:
        keys = _list_image_keys(self._parts[part])
        return [keys[i] for i in indices]

    def read_images(self, part: str, locations: list[bytes]) -> Iterator[RawImage]:
        file = self._parts[part]
        size = file.stat().st_size
        with translate_parse_errors(file, KIND), _open_database(file).begin(buffers=True) as transaction:
            for key in locations:
                value = transaction.get(key, b"")
                if len(value) > size:  # reading beyond its end would kill the process
                    raise PipelineError(f"{file} key {key!r} is larger than the database; fetch it again")
                yield RawImage(f"{file} key {key!r}", bytes(value), None)


def _find_databases(root: Path) -> tuple[dict[str, Path], list[Path]]:
    """Return the database file of each published split, and the other databases beside them."""
    if root.is_file():
        return {"train": root}, []
    root = root.absolute()
    inside = (root / CONTENT).is_file()
    found = sorted(file.parent for file in (root.parent if inside else root).glob(f"*/{CONTENT}"))
    train = [root] if inside else [folder for folder in found if find_split(folder.name) == "train"]
    train = train or (found if len(found) == 1 and not find_split(found[0].name) else [])
    if len(train) != 1:
        names = ", ".join(folder.name for folder in train or found) or "none"
        raise PipelineError(
            f"{root} has no {CONTENT}, nor a single train database ({names}); set data.path to one of them"
        )
    parts = {"train": train[0]}
    if find_split(train[0].name) == "train":
        alike = [f for f in found if remove_split_words(f.name) == remove_split_words(train[0].name)]
        test = [f for split in ("test", "val") for f in alike if find_split(f.name) == split]
        parts |= {"test": test[0]} if test else {}
    beside = [] if inside else [folder for folder in found if folder not in parts.values()]
    return {part: folder / CONTENT for part, folder in parts.items()}, beside


@cache
def _open_database(file: Path) -> lmdb.Environment:
    """Open the database: once for a process, since LMDB refuses to open a file twice."""
    import lmdb

    with translate_parse_errors(file, KIND):
        opened = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
    whole = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
    if (size := file.stat().st_size) < whole:  # reading beyond its end would kill the process
        opened.close()
        raise PipelineError(f"{file} is cut short ({size} of {whole} bytes); fetch it again")
    return opened


@cache
def _list_image_keys(file: Path) -> list[bytes]:
    opened = _open_database(file)
    count = opened.stat()["entries"]
    with translate_parse_errors(file, KIND), opened.begin() as transaction:
        keys = list(islice(transaction.cursor().iternext(keys=True, values=False), count))
    if len(keys) != count:
        raise PipelineError(f"{file} lists {len(keys)} of {count} images; fetch it again")
    return keys
