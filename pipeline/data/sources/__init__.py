"""Sources of images: one class for each `data.source`, all read in the same way.

A new source is a class with the members of `ImageSource` and a line in `SOURCES`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.cifar10 import RemoteCifar10, open_cifar10
from pipeline.data.sources.digits import Digits
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.lmdb import Lmdb
from pipeline.data.sources.npy import Npy
from pipeline.data.sources.parquet import Parquet
from pipeline.data.sources.raw_image import DecodeError, make_record
from pipeline.data.sources.source import ImageSource, split_images, stamp_files
from pipeline.errors import PipelineError
from pipeline.store.files import read_json, write_json
from pipeline.store.tars import Record

SOURCES: dict[str, Callable[[DataConfig], ImageSource]] = {
    "cifar10": open_cifar10,
    "digits": Digits,
    "folder": Folder,
    "lmdb": Lmdb,
    "npy": Npy,
    "parquet": Parquet,
}


def refuse_image(name: str, reason: str) -> None:
    """Raise PipelineError: what becomes of an image that does not decode, unless the caller says otherwise."""
    raise PipelineError(f"{name} does not decode ({reason}); repair it, or raise data.max_undecodable")


class SourceReader:
    """Reads a source as the splits and the records that `data` asks for."""

    def __init__(self, data: DataConfig):
        self.data, self.source = data, SOURCES[data.source](data)

    @cached_property
    def _indices(self) -> dict[str, tuple[str, np.ndarray]]:
        return split_images(self.source, self.data)

    @property
    def splits(self) -> dict[str, int]:
        """Number of images of each split, those that do not decode included."""
        return {split: len(indices) for split, (_, indices) in self._indices.items()}

    def read(
        self, split: str, start: int, stop: int, undecodable: Callable[[str, str], None] = refuse_image
    ) -> Iterator[Record]:
        """Yield images [start, stop) of a split, each under a key made of its split and index.

        PNG bytes that fit already are passed through. `undecodable(name, reason)` is told of each image
        that does not decode; where it returns, the image is left out. Raises PipelineError naming an
        image whose size, channels or label do not fit the configuration.
        """
        part, indices = self._indices[split]
        for index, raw in enumerate(self.source.read(part, indices[start:stop]), start):
            try:
                yield make_record(f"{split}-{index:08d}", raw, self.data)
            except DecodeError as error:
                undecodable(raw.name, str(error))


@lru_cache(maxsize=1)
def open_source(data: DataConfig) -> SourceReader:
    """Open the images that `data` describes; once per process."""
    return SourceReader(data)


def fetch_images(data: DataConfig, downloads: Path) -> DataConfig:
    """Return `data` with an absolute path, fetched into `downloads` if need be: what a worker elsewhere can open."""
    if data.path is not None:
        return dataclasses.replace(data, path=str(Path(data.path).expanduser().resolve()))
    source = SOURCES[data.source](data)
    if isinstance(source, RemoteCifar10):
        return dataclasses.replace(data, path=str(source.download(downloads)))
    return data


def compute_fingerprint(data: DataConfig, cache: Path | None) -> str:
    """Return the sha256 of the content of the images' files and their names below data.path, wherever that lies.

    A file's content is read once: `cache` (a JSON file) remembers the result as long as paths, sizes and
    modification times stay. Raises PipelineError where images are missing or broken.
    """
    reader = SourceReader(data)
    place = f"{data.source} {data.path and Path(data.path).resolve()} {data.labels > 0}"
    stamp = stamp_files(reader.source.files)
    known: dict[str, dict[str, str]] = {}
    with suppress(PipelineError):  # a broken cache holds nothing
        known = read_json(cache) if cache and cache.exists() else {}
    if known.get(place, {}).get("stamp") == stamp:
        return known[place]["content"]
    content = reader.source.digest()
    if not reader.splits.get("train"):
        raise PipelineError(f"data.source={data.source}, data.path={data.path} holds no images to train on")
    if cache:
        with suppress(OSError):  # a cache that cannot be written only costs time
            write_json(cache, {**known, place: {"stamp": stamp, "content": content}})
    return content
