"""Image sources: one class for each value of `data.source`.

A new source is a class with the members of `ImageSource` and a line in `SOURCES`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from pipeline.config import DataConfig
from pipeline.data.sources.base import (
    ImageSource,
    hash_file_stats,
    lies_in_class_order,
    make_fixed_permutation,
    split_images,
)
from pipeline.data.sources.cifar10 import Cifar10Download, open_cifar10
from pipeline.data.sources.digits import DigitsSource
from pipeline.data.sources.folder import FolderSource
from pipeline.data.sources.lmdb import LmdbSource
from pipeline.data.sources.npy import NpySource
from pipeline.data.sources.parquet import ParquetSource
from pipeline.data.sources.raw_image import DecodeError, convert_to_record
from pipeline.errors import PipelineError
from pipeline.store.files import read_json, write_json
from pipeline.store.tars import Record

SOURCES: dict[str, Callable[[DataConfig], ImageSource]] = {
    "cifar10": open_cifar10,
    "digits": DigitsSource,
    "folder": FolderSource,
    "lmdb": LmdbSource,
    "npy": NpySource,
    "parquet": ParquetSource,
}


def raise_undecodable(name: str, reason: str) -> None:
    """Raise PipelineError for an image that cannot be decoded (the default handler)."""
    raise PipelineError(f"{name} does not decode ({reason}); repair it, or raise data.max_undecodable")


class SourceReader:
    """Reader of a source: its splits and records, by the settings of `data`."""

    def __init__(self, data: DataConfig):
        self.data, self.source = data, SOURCES[data.source](data)

    @cached_property
    def _stored(self) -> dict[str, tuple[str, np.ndarray]]:
        return split_images(self.source, self.data)

    @cached_property
    def mixed(self) -> list[str]:
        """Splits that are stored class by class: their order is shuffled."""
        stored = self._stored.items()
        labels = {part: self.source.read_labels(part) for _, (part, _) in stored}
        return [split for split, (part, indices) in stored if lies_in_class_order(labels[part], indices)]

    @cached_property
    def _indices(self) -> dict[str, tuple[str, np.ndarray]]:
        return {
            split: (part, indices[make_fixed_permutation(len(indices))] if split in self.mixed else indices)
            for split, (part, indices) in self._stored.items()
        }

    @property
    def splits(self) -> dict[str, int]:
        """Number of images by split, undecodable ones included."""
        return {split: len(indices) for split, (_, indices) in self._stored.items()}

    def read_records(
        self, split: str, start: int, stop: int, undecodable: Callable[[str, str], None] = raise_undecodable
    ) -> Iterator[Record]:
        """Yield the records of images [start, stop) of a split.

        PNG bytes that fit already stay as they are. `undecodable(name, reason)` is called for each image that cannot
        be decoded; where it returns, the image is left out. Raises PipelineError naming an image whose size, channels
        or label do not fit `data`.
        """
        part, indices = self._indices[split]
        for index, raw in enumerate(self.source.read_images(part, indices[start:stop]), start):
            try:
                yield convert_to_record(f"{split}-{index:08d}", raw, self.data)
            except DecodeError as error:
                undecodable(raw.name, str(error))


@lru_cache(maxsize=1)
def open_source(data: DataConfig) -> SourceReader:
    """Return the reader of the source that `data` names; cached per process."""
    return SourceReader(data)


def download_source(data: DataConfig, downloads: Path) -> DataConfig:
    """Return `data` with an absolute path, after downloading the images into `downloads` if needed."""
    if data.path is not None:
        return dataclasses.replace(data, path=str(Path(data.path).expanduser().resolve()))
    source = SOURCES[data.source](data)
    if isinstance(source, Cifar10Download):
        return dataclasses.replace(data, path=str(source.download(downloads)))
    return data


class Fingerprint(TypedDict):
    """An entry of the cache of fingerprints. stamp: the sha256 over paths, sizes and times of the files."""

    stamp: str
    content: str


def compute_fingerprint(data: DataConfig, cache: Path | None, remember: bool = True) -> str:
    """Return the sha256 over the names and contents of the image files; where data.path lies does not matter.

    `cache` (a JSON file) holds the result while paths, sizes and modification times stay; it is written if `remember`.
    Raises PipelineError where images are missing or broken.
    """
    reader = SourceReader(data)
    place = f"2 {data.source} {data.path and Path(data.path).resolve()} {data.labels > 0}"
    stamp = hash_file_stats(reader.source.files)
    known: dict[str, Fingerprint] = {}
    with suppress(PipelineError):  # a broken cache holds nothing
        known = read_json(cache, dict[str, Fingerprint]) if cache and cache.exists() else {}
    if place in known and known[place]["stamp"] == stamp:
        return known[place]["content"]
    content = reader.source.compute_fingerprint()
    if not reader.splits.get("train"):
        raise PipelineError(f"data.source={data.source}, data.path={data.path} holds no images to train on")
    if reader.mixed:
        content = hashlib.sha256(f"{content} {reader.mixed}".encode()).hexdigest()
    if cache and remember:
        with suppress(OSError):  # a cache that cannot be written only costs time
            write_json(cache, {**known, place: {"stamp": stamp, "content": content}})
    return content
