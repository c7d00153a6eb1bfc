"""The members of every source of images, the hash of its files, and its splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.raw_image import RawImage
from pipeline.errors import PipelineError
from pipeline.store.files import hash_file


class ImageSource(Protocol):
    """A set of images. Making one only lists its files, and raises PipelineError where there are none.

    files: all that it reads, below `root`. order: how the images of a split follow each other: as they are stored,
    where neighbours are read together cheaply, or shuffled, so that any first n mix the classes.
    """

    files: list[Path]
    root: Path
    order: Literal["stored", "shuffled", "shuffled if held out"] = "stored"

    def digest(self) -> str:
        """Return the sha256 of the files' content and their names below `root`, wherever that lies."""
        with explain_read_errors():
            lines = [f"{file.relative_to(self.root).as_posix()} {hash_file(file)}" for file in self.files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def count(self) -> dict[str, int]:
        """Return the number of images of "train" and, if the set has a part of that name, of "test"."""
        ...

    def read(self, part: str, indices: np.ndarray) -> Iterator[RawImage]:
        """Yield these images of a part, int64 (n,), in this order; they ascend where `order` is "stored"."""
        ...


class ArraySource(ImageSource, Protocol):
    """A source whose parts are arrays: images, uint8 (N,H,W,C), and labels, integers (N,), or None."""

    @property
    def arrays(self) -> Mapping[str, tuple[np.ndarray, np.ndarray | None]]: ...

    def count(self) -> dict[str, int]:
        return {part: len(images) for part, (images, _) in self.arrays.items()}

    def read(self, part: str, indices: np.ndarray) -> Iterator[RawImage]:
        images, labels = self.arrays[part]
        for i in indices:
            label = None if labels is None else int(labels[i])
            yield RawImage(f"{self.root} {part} image {i}", np.asarray(images[i]), label)


def shuffle(n: int) -> np.ndarray:
    """Return a permutation of 0..n-1, int64 (n,), that depends on n alone: on no machine, on no version of NumPy.

    It sorts the raw 64-bit words of the counter-based generator Philox under the key 0: NumPy promises that
    stream for ever, and promises nothing of `Generator.permutation`.
    """
    return np.argsort(np.random.Philox(key=0).random_raw(n), kind="stable")


def split_images(source: ImageSource, data: DataConfig) -> dict[str, tuple[str, np.ndarray]]:
    """Return for each split the part of the source that holds it, and its indices there, int64 (n,).

    A source without a part "test" has `data.test_images` held out by a fixed shuffle.
    """
    counts = source.count()
    if "test" in counts:
        arrange = shuffle if source.order == "shuffled" else np.arange
        return {split: (split, arrange(n)) for split, n in counts.items()}
    n, held_out = counts["train"], data.test_images
    if held_out >= n:
        raise PipelineError(
            f"{data.path} has {n} images; data.test_images={held_out} leaves none to train on"
        )
    order = shuffle(n)
    splits = {"train": order[held_out:], "test": order[:held_out]}
    if source.order == "stored":
        splits = {split: np.sort(indices) for split, indices in splits.items()}
    return {split: ("train", indices) for split, indices in splits.items() if len(indices)}


def stamp_files(files: list[Path]) -> str:
    """Return the sha256 over paths, sizes and modification times: it tells cheaply that nothing has changed."""
    with explain_read_errors():
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


@contextmanager
def explain_read_errors() -> Iterator[None]:
    """Say which file cannot be read, and what to do."""
    try:
        yield
    except OSError as error:
        raise PipelineError(
            f"{error.filename} cannot be read ({error.strerror}); restore or remove it"
        ) from error
