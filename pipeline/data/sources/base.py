"""The base classes of image sources, and how their files and splits are found."""

import hashlib
import json
import os
import re
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.raw_image import DecodeError, RawImage, convert_to_record
from pipeline.errors import PipelineError
from pipeline.store.files import hash_file
from pipeline.store.tars import Record, decode_png

MAX_IMAGES = 2**31
WORDS = {
    "train": {"train", "training", "trainset"},
    "test": {"test", "testing", "testset"},
    "val": {"val", "valid", "validation", "dev", "valset"},
}
_WORD = re.compile(r"[^\W\d_]+")
_CAMEL_CASE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
Locations = tuple[str, Any]  # a published split, and where in it some images are


def raise_undecodable(name: str, reason: str) -> None:
    """Raise PipelineError for an image that cannot be decoded (the default handler)."""
    raise PipelineError(f"{name} does not decode ({reason}); repair it, or raise data.max_undecodable")


class ImageSource(ABC):
    """A set of images on disk. The constructor only lists files; it raises PipelineError if there are none.

    files: all that it reads, below `root`. order: the order of the images in a split: stored, if reading neighbours
    together is cheap, or shuffled, so that the first n images always mix the classes. A source has the published split
    "train", and may have "test". skipped: how many files are not read, by kind. notes: guesses, for the user. classes:
    the names. layout: a mark of how splits and classes are found, if an earlier version read these files differently.
    """

    files: list[Path]
    order: Literal["stored", "shuffled", "shuffled if held out"] = "stored"
    skipped: Mapping[str, int] = {}
    notes: Sequence[str] = ()
    classes: Sequence[str] = ()
    layout: str = ""

    def __init__(self, data: DataConfig):
        self.data, self.root = data, Path(data.path or "")

    @abstractmethod
    def count_images(self) -> dict[str, int]:
        """Return the number of images by published split."""

    @abstractmethod
    def read_images(self, part: str, locations: Any) -> Iterator[RawImage]:
        """Yield images of a published split, each by its location (see `locate_images`)."""

    def locate_images(self, part: str, indices: np.ndarray) -> Sequence[Any] | np.ndarray:
        """Return the locations of images `indices`, int64 (n,), by which `read_images` finds each directly."""
        return indices

    def read_labels(self, part: str) -> np.ndarray | None:
        """Return the labels of the images of a published split, (n,), if they are stored together."""
        return None

    def compute_fingerprint(self) -> str:
        """Return the sha256 over the files' contents and their names below `root`."""
        with translate_read_errors():
            lines = [f"{file.relative_to(self.root).as_posix()} {hash_file(file)}" for file in self.files]
        lines += [self.layout] if self.layout else []
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()

    @cached_property
    def splits(self) -> dict[str, int]:
        """Number of images by split, undecodable ones included."""
        return {split: len(indices) for split, (_, indices) in self._chosen_indices.items()}

    @cached_property
    def shuffled_splits(self) -> list[str]:
        """Splits that are stored class by class: their order is shuffled."""
        stored = self._stored_indices.items()
        return [s for s, (part, indices) in stored if _lies_in_class_order(self.read_labels(part), indices)]

    @cached_property
    def _stored_indices(self) -> dict[str, tuple[str, np.ndarray]]:
        """For each split, the published split that contains it, and its indices there, int64 (n,).

        Without a published split "test", `data.test_images` images, drawn by a fixed permutation, are the test split.
        """
        counts, held_out = self.count_images(), self.data.test_images
        for part, n in counts.items():
            if n > MAX_IMAGES:
                raise PipelineError(f"{self.root} claims to hold {n} images as {part}; fetch it again")
        if "test" in counts:
            arrange = make_fixed_permutation if self.order == "shuffled" else np.arange
            return {split: (split, arrange(n)) for split, n in counts.items()}
        if held_out >= (n := counts["train"]):
            reason = f"has {n} images; data.test_images={held_out} leaves none to train on"
            raise PipelineError(f"{self.data.path} {reason}")
        order = make_fixed_permutation(n)
        splits = {"train": order[held_out:], "test": order[:held_out]}
        if self.order == "stored":
            splits = {split: np.sort(indices) for split, indices in splits.items()}
        return {split: ("train", indices) for split, indices in splits.items() if len(indices)}

    @cached_property
    def _chosen_indices(self) -> dict[str, tuple[str, np.ndarray]]:
        """`_stored_indices` in the order of reading: shuffled if need be, and at most `data.limit` to train on.

        The limited set is the first images, in a fixed permutation, that decode and equal no earlier one.
        """
        found = {
            s: (part, order[make_fixed_permutation(len(order))] if s in self.shuffled_splits else order)
            for s, (part, order) in self._stored_indices.items()
        }
        if (limit := self.data.limit) is None:
            return found
        part, indices = self._stored_indices["train"]
        order, chosen = indices[make_fixed_permutation(len(indices))], dict[bytes, int]()
        for index, raw in zip(order, self.read_images(part, self.locate_images(part, order)), strict=True):
            with suppress(DecodeError):
                chosen.setdefault(decode_png(convert_to_record("", raw, self.data).png).tobytes(), index)
            if len(chosen) == limit:
                return found | {"train": (part, np.array([*chosen.values()]))}
        raise PipelineError(f"data.limit is {limit}, but only {len(chosen)} training images differ; lower it")

    def locate_range(self, split: str, start: int, stop: int) -> Locations:
        part, indices = self._chosen_indices[split]
        return part, self.locate_images(part, indices[start:stop])

    def read_records(
        self, split: str, start: int, stop: int, undecodable: Callable[[str, str], None] = raise_undecodable,
        locations: Locations | None = None,
    ) -> Iterator[Record]:  # fmt: skip
        """Yield the records of images [start, stop) of a split; locations: what `locate_range` returns for them.

        PNG bytes that fit already are not changed. `undecodable(name, reason)` is called for each image that cannot
        be decoded; if it returns, the image is skipped. Raises PipelineError naming an image whose size, channels or
        label do not fit `data`.
        """
        part, found = locations or self.locate_range(split, start, stop)
        for index, raw in enumerate(self.read_images(part, found), start):
            try:
                yield convert_to_record(f"{split}-{index:08d}", raw, self.data)
            except DecodeError as error:
                undecodable(raw.name, str(error))


class ArraySource(ImageSource):
    """A source in arrays, by published split: images, uint8 (N,H,W,C), and labels, integers (N,), or None."""

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, tuple[np.ndarray, np.ndarray | None]]: ...

    def count_images(self) -> dict[str, int]:
        return {part: len(images) for part, (images, _) in self.arrays.items()}

    def read_labels(self, part: str) -> np.ndarray | None:
        return self.arrays[part][1]

    def read_images(self, part: str, indices: np.ndarray) -> Iterator[RawImage]:
        images, labels = self.arrays[part]
        for i in indices:
            label = None if labels is None else int(labels[i])
            yield RawImage(f"{self.root} {part} image {i}", np.asarray(images[i]), label)


@lru_cache(maxsize=2)  # every shard asks for it, and a split can have millions of images
def make_fixed_permutation(n: int) -> np.ndarray:
    """Return a permutation of 0..n-1, int64 (n,), the same for every machine and every version of NumPy.

    It sorts the raw words of the generator Philox with key 0: NumPy promises that stream for ever, but not
    `Generator.permutation`.
    """
    return np.argsort(np.random.Philox(key=0).random_raw(n), kind="stable")


def _lies_in_class_order(labels: np.ndarray | None, indices: np.ndarray) -> bool:
    """Return whether neighbours have the same class much more often than in a random order."""
    if labels is None or len(labels) <= indices.max(initial=0):
        return False
    classes, counts = np.unique(labels[indices], return_counts=True)
    changes = np.count_nonzero(np.diff(labels[indices]))
    return bool(len(classes) > 1 and changes < (len(indices) - np.sum(counts**2) / len(indices)) / 2)


def hash_file_stats(files: list[Path]) -> str:
    """Return the sha256 over paths, sizes and modification times.

    Raises PipelineError naming a file that is no regular one, before reading it could block for ever.
    """
    stats = []
    with translate_read_errors():
        for file in files:
            facts = file.stat()
            if not stat.S_ISREG(facts.st_mode):
                raise PipelineError(f"{file} is no regular file; remove it")
            stats.append((str(file.resolve()), facts.st_size, facts.st_mtime_ns))
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


@contextmanager
def translate_read_errors() -> Iterator[None]:
    """Raise an OSError as PipelineError with file and remedy."""
    try:
        yield
    except OSError as error:
        problem = f"{error.filename} cannot be read ({error.strerror}); restore or remove it"
        raise PipelineError(problem) from error


@contextmanager
def translate_parse_errors(name: object, kind: str, remedy: str = "fetch it again") -> Iterator[None]:
    """Raise any error of a library that reads a broken file as PipelineError."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PipelineError(f"{name} is no {kind} ({reason}); {remedy}") from error


def find_split(name: str) -> str | None:
    """Return train, test or val if that is a whole word of `name`; None if both train and another one are."""
    words = {word.lower() for rule in (_WORD, _CAMEL_CASE) for word in rule.findall(name)}
    found = [split for split, known in WORDS.items() if words & known]
    return None if found[:1] == ["train"] and len(found) > 1 else next(iter(found), None)


def remove_split_words(name: str) -> str:
    """Remove the words that `find_split` knows from `name`, to compare the names of two splits."""
    return _WORD.sub(lambda word: "" if find_split(word[0]) else word[0], name)


def list_files(root: Path, is_wanted: Callable[[Path], bool]) -> tuple[list[Path], Counter[str]]:
    """List the wanted files at any depth, sorted by path, and count the skipped ones by kind.

    Links are followed, but each folder is read once. Hidden files, pipes and devices are skipped.
    """
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    folders = [root]
    links: list[Path] = []
    while folders or (links := sorted(links)):
        folder = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            skipped[f"folder that lies here under another name ({folder.name})"] += 1
            continue
        seen.add(real)
        with translate_read_errors():
            for entry in os.scandir(folder):
                path = Path(entry.path)
                if entry.name.startswith("."):
                    skipped["hidden"] += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif not entry.is_file() and path.exists():
                    skipped[f"no regular file ({entry.name})"] += 1
                elif is_wanted(path):
                    found.append(path)
                else:
                    skipped[path.suffix.lower() or "without extension"] += 1
    return sorted(found), skipped
