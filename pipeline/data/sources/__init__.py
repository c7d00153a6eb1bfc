"""Where images come from: one class for each `data.source`, all read in the same way.

A new kind of set is a class with the four members of `ImageSet` and a line in `KINDS`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import DataConfig
from pipeline.data.sources.cifar10 import download, open_cifar10
from pipeline.data.sources.content import stamp_of
from pipeline.data.sources.digits import Digits
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.lmdb import Lmdb
from pipeline.data.sources.npy import Npy
from pipeline.data.sources.parquet import Parquet
from pipeline.data.sources.picture import Picture, Undecodable, to_record
from pipeline.errors import PipelineError
from pipeline.store.files import read_json, write_json
from pipeline.store.tars import Record


class ImageSet(Protocol):
    """A set of images. Making one only lists its files, and raises PipelineError where there are none.

    files: all that it reads. digest: sha256 of their content, wherever they lie. splits: the number of images
    of "train" and, if there is one, "test". pictures: images [start, stop) of a split, as the set holds them.
    """

    def files(self) -> list[Path]: ...

    def digest(self) -> str: ...

    @property
    def splits(self) -> dict[str, int]: ...

    def pictures(self, split: str, start: int, stop: int) -> Iterator[Picture]: ...


KINDS: dict[str, Callable[[DataConfig], ImageSet]] = {
    "cifar10": open_cifar10,
    "digits": Digits,
    "folder": Folder,
    "lmdb": Lmdb,
    "npy": Npy,
    "parquet": Parquet,
}


def refuse(name: str, reason: str) -> None:
    """What becomes of an image that does not decode, unless the caller says otherwise."""
    raise PipelineError(f"{name} does not decode ({reason}); repair it, or raise data.max_undecodable")


class Source:
    """A set of images, seen as the records that `data` asks for."""

    def __init__(self, data: DataConfig):
        self._data, self._images = data, KINDS[data.source](data)

    @property
    def splits(self) -> dict[str, int]:
        """Number of images of each split, those that do not decode included."""
        return self._images.splits

    def read(
        self, split: str, start: int, stop: int, undecodable: Callable[[str, str], None] = refuse
    ) -> Iterator[Record]:
        """Images [start, stop) of a split, each under a key made of its split and index.

        PNG bytes that fit already are passed through. `undecodable(name, reason)` is told of each image
        that does not decode; where it returns, the image is left out. Raises PipelineError naming an
        image whose size, channels or label do not fit the configuration.
        """
        for index, picture in enumerate(self._images.pictures(split, start, stop), start):
            try:
                yield to_record(f"{split}-{index:08d}", picture, self._data)
            except Undecodable as error:
                undecodable(picture.name, str(error))


@lru_cache(maxsize=1)
def open_source(data: DataConfig) -> Source:
    """The images that `data` describes; opened once per process."""
    return Source(data)


def locate(data: DataConfig, downloads: Path) -> DataConfig:
    """`data` with an absolute path, fetched into `downloads` if need be: what a worker elsewhere can open."""
    if data.path is not None:
        return dataclasses.replace(data, path=str(Path(data.path).expanduser().resolve()))
    if data.source == "cifar10":
        return dataclasses.replace(data, path=str(download(downloads)))
    return data


def fingerprint(data: DataConfig, cache: Path | None) -> str:
    """sha256 of the content of the images' files and their names below data.path, wherever that lies.

    A file's content is read once: `cache` (a JSON file) remembers the result as long as paths, sizes and
    modification times stay. Raises PipelineError where images are missing or broken.
    """
    images = KINDS[data.source](data)
    place = f"{data.source} {data.path and Path(data.path).resolve()} {data.labels > 0}"
    stamp = stamp_of(images.files())
    known = _remembered(cache)
    if known.get(place, {}).get("stamp") == stamp:
        return known[place]["content"]
    content = images.digest()
    if not images.splits.get("train"):
        raise PipelineError(f"data.source={data.source}, data.path={data.path} holds no images to train on")
    if cache:
        with suppress(OSError):  # a cache that cannot be written only costs time
            write_json(cache, {**known, place: {"stamp": stamp, "content": content}})
    return content


def _remembered(cache: Path | None) -> dict[str, Any]:
    """What the cache holds; a broken one holds nothing."""
    if cache is None or not cache.exists():
        return {}
    with suppress(PipelineError):
        known = read_json(cache)
        if isinstance(known, dict) and all(isinstance(entry, dict) for entry in known.values()):
            return known
    return {}
