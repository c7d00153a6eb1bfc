"""Image sources: what opens each value of `data.source`.

A new source is a class with the members of `ImageSource` and a line in `SOURCES`.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data.sources.base import ImageSource, hash_file_stats
from pipeline.data.sources.cifar10 import download_archive, hash_batches, open_cifar10
from pipeline.data.sources.digits import DigitsSource
from pipeline.data.sources.folder import FolderSource
from pipeline.data.sources.lmdb import LmdbSource
from pipeline.data.sources.npy import NpySource
from pipeline.data.sources.parquet import ParquetSource
from pipeline.errors import PipelineError
from pipeline.store.files import read_record, write_json

SOURCES: dict[str, Callable[[DataConfig], ImageSource]] = {
    "cifar10": open_cifar10,
    "digits": DigitsSource,
    "folder": FolderSource,
    "lmdb": LmdbSource,
    "npy": NpySource,
    "parquet": ParquetSource,
}


@lru_cache(maxsize=1)
def open_source(data: DataConfig) -> ImageSource:
    """Open the source that `data` names; cached per process."""
    return SOURCES[data.source](data)


def download_source(data: DataConfig, downloads: Path) -> DataConfig:
    """Return `data` with an absolute path, after downloading the images into `downloads` if needed."""
    path = Path(data.path).expanduser().resolve() if data.path is not None else None
    if data.source == "cifar10":
        path = path or download_archive(downloads)
    return dataclasses.replace(data, path=str(path) if path else None)


def compute_fingerprint(data: DataConfig, cache: Path | None, remember: bool = True) -> str:
    """Return the sha256 over the names and contents of the image files; where data.path lies does not matter.

    `cache` (a JSON file) holds the result while paths, sizes and modification times stay; it is written if `remember`.
    Its stamp is the sha256 over these facts and the result.
    Raises PipelineError if images are missing or broken.
    """
    if data.source == "cifar10" and data.path is None:
        return hash_batches()
    source = SOURCES[data.source](data)
    place = f"2 {data.source} {data.path and Path(data.path).resolve()} {data.labels > 0}"
    stats = hash_file_stats(source.files)

    def stamp(content: str) -> str:
        return hashlib.sha256(f"{stats} {content}".encode()).hexdigest()

    known = read_record(cache, dict[str, dict[str, str]]) if cache else {}
    found = known.get(place, {}).get("content", "")
    if found and known[place].get("stamp") == stamp(found):
        return found
    content = source.compute_fingerprint()
    if not source.splits.get("train"):
        raise PipelineError(f"data.source={data.source}, data.path={data.path} holds no images to train on")
    if source.shuffled_splits:
        content = hashlib.sha256(f"{content} {source.shuffled_splits}".encode()).hexdigest()
    if cache and remember:
        with suppress(OSError):  # a cache that cannot be written only costs time
            write_json(cache, {**known, place: {"stamp": stamp(content), "content": content}})
    return content
