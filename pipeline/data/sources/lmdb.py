"""Images in LMDB databases, as LSUN is published: every value is an encoded image, its key does not matter.

`data.path` is one database (a folder with data.mdb, or the file itself), or a folder that holds a single
`*train_lmdb`. Its neighbour `*val_lmdb` is the test split; where there is none, data.test_images are held out
by a fixed shuffle. There are no labels.
"""

import importlib.util
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.content import digest_of
from pipeline.data.sources.order import neighbouring
from pipeline.data.sources.picture import Picture
from pipeline.errors import PipelineError

TRAIN, VAL, CONTENT = "train_lmdb", "val_lmdb", "data.mdb"


class Lmdb:
    """Images in the order of their keys. The keys (40 bytes each in LSUN) are held in memory once read."""

    def __init__(self, data: DataConfig):
        assert data.path is not None  # DataConfig refuses it
        if importlib.util.find_spec("lmdb") is None:
            raise PipelineError("data.source=lmdb needs the package lmdb: pip install lmdb")
        self._root, self._test_images = Path(data.path), data.test_images
        self._files = _databases(self._root)

    def files(self) -> list[Path]:
        return list(self._files.values())

    def digest(self) -> str:
        folder = self._files["train"].parent
        # The names of LSUN's folders tell its splits apart; any other folder is a place.
        return digest_of(self.files(), folder.parent if folder.name.endswith(TRAIN) else folder)

    @cached_property
    def splits(self) -> dict[str, int]:
        return {split: len(indices) for split, (_, indices) in self._order.items()}

    def pictures(self, split: str, start: int, stop: int) -> Iterator[Picture]:
        origin, indices = self._order[split]
        file, keys = self._files[origin], self._keys[origin]
        with _environment(file).begin() as transaction:
            for i in indices[start:stop]:
                yield Picture(f"{file} key {keys[i]!r}", transaction.get(keys[i]), None)

    @cached_property
    def _order(self) -> dict[str, tuple[str, np.ndarray]]:
        counts = {split: _environment(file).stat()["entries"] for split, file in self._files.items()}
        return neighbouring(self._root, counts, self._test_images)

    @cached_property
    def _keys(self) -> dict[str, list[bytes]]:
        return {split: _keys_of(file) for split, file in self._files.items()}


def _databases(root: Path) -> dict[str, Path]:
    """split -> the file of its database."""
    if root.is_file():
        return {"train": root}
    if (root / CONTENT).is_file():
        train = root
    else:
        found = sorted(file.parent for file in root.glob(f"*{TRAIN}/{CONTENT}"))
        if len(found) != 1:
            names = ", ".join(folder.name for folder in found) or "none"
            raise PipelineError(
                f"{root} has no {CONTENT}, nor a single *{TRAIN} ({names}); set data.path to one of them"
            )
        train = found[0]
    test = train.with_name(train.name.removesuffix(TRAIN) + VAL)
    both = {"train": train / CONTENT, "test": test / CONTENT}
    return {split: file for split, file in both.items() if file.is_file()}


@cache
def _environment(file: Path) -> Any:
    """The open database: one for a process, since LMDB refuses to open a file twice."""
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


def _keys_of(file: Path) -> list[bytes]:
    with _environment(file).begin() as transaction:
        return list(transaction.cursor().iternext(keys=True, values=False))
