"""Image shards: webdataset tars of PNG + label, sealed by a manifest, verified whenever they are read.

A folder of shards holds `<split>-00000.tar ...` with members `<key>.png` and, where there are labels,
`<key>.cls` (the label in decimal digits), and `manifest.json`:

    {"files":  {"train-00000.tar": {"bytes": ..., "sha256": ..., "count": ...}, ...},
     "splits": {"train": {"count": ..., "shards": ["train-00000.tar", ...]}, ...}, ...facts}

An image's index in its split is its place in the shards, read in the order of the list. Beside each tar stands
`<split>-00000.json` with what `write_shard` found, the place of every image in the tar included.
"""

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.store.files import (
    MANIFEST,
    atomic_file,
    check_file,
    file_facts,
    read_json,
    read_manifest,
    sha256_of,
    write_json,
)

FILE_FACTS = ("bytes", "sha256", "count")
OFFSET, SIZE, CRC32, LABEL = range(4)  # the columns of an image's place
REMEDY = "delete it and run the stage that wrote it"
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Record:
    """One image of a shard. `key` is unique in its split and has no dot; `label` is None where unlabelled."""

    key: str
    png: bytes
    label: int | None


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H,W), (H,W,1) or (H,W,3) -> PNG. Equal arrays give equal bytes (with one build of Pillow)."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"expected uint8 (H,W), (H,W,1) or (H,W,3), not {image.dtype} {image.shape}")
    stream = io.BytesIO()
    grey = image.ndim == 3 and image.shape[2] == 1
    Image.fromarray(image[:, :, 0] if grey else image).save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def decode_png(png: bytes) -> np.ndarray:
    """An 8-bit grey or RGB PNG -> uint8 (C,H,W)."""
    image = Image.open(io.BytesIO(png), formats=("PNG",))
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"a PNG of mode {image.mode} in a shard; only L and RGB are written")
    pixels = np.asarray(image)
    return pixels[None] if image.mode == "L" else pixels.transpose(2, 0, 1)


# One shard


def write_shard(path: Path, records: Iterable[Record]) -> dict[str, Any]:
    """Write a tar atomically; equal records give equal bytes. Returns its name, count, bytes and sha256, and for
    each image its place: offset and size of the PNG in the tar, its crc32, and the label (-1 = none)."""
    from webdataset import TarWriter

    last = ""
    places: list[list[int]] = []
    with atomic_file(path) as temporary:
        with temporary.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for record in records:
                if record.key <= last or "." in record.key:
                    raise ValueError(f"key {record.key!r} after {last!r}: keys ascend and hold no dot")
                tar.write(_members(record))
                places.append(_place(record, tar.tarstream.offset))
                last = record.key
        facts = file_facts(temporary)
    return {"name": path.name, "count": len(places), **facts, "places": places}


def _place(record: Record, end: int) -> list[int]:
    """Of a record that ends at `end` in its tar: the PNG is its last member, padded to whole blocks."""
    size = len(record.png)
    offset = end - -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return [offset, size, zlib.crc32(record.png), -1 if record.label is None else record.label]


def _members(record: Record) -> dict[str, Any]:
    label = {} if record.label is None else {"cls": str(record.label).encode()}
    return {"__key__": record.key, "png": record.png, **label}


def read_shard(path: Path, count: int | None = None) -> Iterator[Record]:
    """The records of a tar, in order.

    Raises PipelineError naming the shard where the tar is cut or broken, or does not hold `count` records.
    It cannot see a flipped bit in an image: `load_images` compares the sha256 of the manifest first.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    found = 0
    try:
        with path.open("rb") as file:
            _require_end(file)
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                label = int(sample["cls"]) if "cls" in sample else None
                yield Record(sample["__key__"], sample["png"], label)
                found += 1
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        raise PipelineError(f"{path} cannot be read ({error}); {REMEDY}") from error
    if count is not None and found != count:
        raise PipelineError(f"{path} holds {found} images, not {count}; {REMEDY}")


def _require_end(file: io.BufferedReader) -> None:
    """A tar that was cut between two members reads silently short, but has lost its closing blocks."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - len(END_OF_TAR)))
    if file.read() != END_OF_TAR:
        raise tarfile.ReadError("truncated: its end-of-archive blocks are missing")
    file.seek(0)


# A folder of shards


def write_index(
    directory: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]], **facts: Any
) -> dict[str, Any]:
    """Seal a folder: `splits` maps a split to what `write_shard` returned for its shards, in order."""
    shards = [shard for of_split in splits.values() for shard in of_split]
    manifest = {
        "files": {shard["name"]: {key: shard[key] for key in FILE_FACTS} for shard in shards},
        "splits": {
            split: {"count": sum(s["count"] for s in of_split), "shards": [s["name"] for s in of_split]}
            for split, of_split in splits.items()
        },
        **facts,
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


@dataclass(frozen=True)
class Index:
    """The manifest of a folder of shards."""

    directory: Path
    facts: dict[str, Any]

    @property
    def splits(self) -> list[str]:
        return list(self.facts["splits"])

    def count(self, split: str) -> int:
        return self._split(split)["count"]

    def shards(self, split: str) -> list[tuple[str, int, int]]:
        """(name, index of its first image, number of images) of each shard."""
        names = self._split(split)["shards"]
        counts = [self.facts["files"][name]["count"] for name in names]
        firsts = accumulate(counts, initial=0)
        return list(zip(names, firsts, counts, strict=False))

    def places(self, name: str) -> np.ndarray:
        """Where the images of a tar lie in it: int64 (count, 4), columns OFFSET, SIZE, CRC32, LABEL."""
        file = (self.directory / name).with_suffix(".json")
        facts = read_json(file) if file.exists() else {}
        if facts.get("sha256") != self.facts["files"][name]["sha256"]:
            raise PipelineError(
                f"{file} is not the index of {name}; delete both and run the stage that wrote them"
            )
        return np.array(facts["places"], dtype=np.int64).reshape(-1, 4)

    @cached_property
    def digest(self) -> str:
        """sha256 of the manifest, which holds the sha256 of every shard."""
        return sha256_of(self.directory / MANIFEST)

    def _split(self, split: str) -> dict[str, Any]:
        if split not in self.facts["splits"]:
            raise PipelineError(
                f"{self.directory} has no {split} split, only {', '.join(self.splits)}; "
                "for a source without one, set data.test_images"
            )
        return self.facts["splits"][split]


def open_index(directory: Path) -> Index:
    """Raises PipelineError where the folder was never sealed, or a shard is missing or has another size."""
    manifest = read_manifest(directory, check="size")
    if manifest is None:
        raise PipelineError(f"{directory} holds no finished shards; run the stage that writes them")
    return Index(directory, manifest)


def load_images(
    directory: Path, split: str, start: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images [start, stop) of a split: uint8 (n,C,H,W), and int64 labels (n,), -1 = none.

    Compares the sha256 of each shard it opens. Raises PipelineError naming a shard that differs, or the
    split where it has fewer than `stop` images.
    """
    index = open_index(directory)
    stop = index.count(split) if stop is None else stop
    if not 0 <= start < stop <= index.count(split):
        raise PipelineError(
            f"images {start} to {stop} of the {split} split of {directory} were asked for; "
            f"it has {index.count(split)}"
        )
    parts = [
        _decode(_verified(index, name)[max(0, start - first) : stop - first])
        for name, first, count in index.shards(split)
        if first < stop and start < first + count
    ]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def iterate_shard_images(directory: Path, split: str, shard_name: str) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of one shard, as `load_images` gives them."""
    first, count = next((f, c) for name, f, c in open_index(directory).shards(split) if name == shard_name)
    return load_images(directory, split, first, first + count)


def _verified(index: Index, name: str) -> list[Record]:
    facts = index.facts["files"][name]
    check_file(index.directory / name, facts, "sha256")
    return list(read_shard(index.directory / name, facts["count"]))


def _decode(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    labels = [-1 if record.label is None else record.label for record in records]
    return np.stack([decode_png(record.png) for record in records]), np.array(labels, dtype=np.int64)
