"""Image shards: webdataset tars of PNG + label, sealed by a manifest, verified whenever they are read.

A folder of shards holds `<split>-00000.tar ...` with members `<key>.png` and, if there are labels, `<key>.cls` (the
label in decimal digits), beside each tar a .json with its facts and the offset of every image, and `manifest.json`.
An image's index in its split counts the images of the shards in the order of the manifest's list.
"""

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from PIL import Image
from typing_extensions import TypedDict

from pipeline.errors import PipelineError
from pipeline.store import files
from pipeline.store.keys import hash_content

OFFSET, SIZE, CRC32, LABEL = range(4)  # the columns of `read_offsets`
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Record:
    """One image of a shard. `key` is unique in its split and has no dot; `label` is None if unlabelled."""

    key: str
    png: bytes
    label: int | None

    @property
    def number(self) -> int:
        """The label, or -1."""
        return -1 if self.label is None else self.label


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 (H,W), (H,W,1) or (H,W,3) as PNG. Equal arrays give equal bytes (with one build of Pillow)."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"expected uint8 (H,W), (H,W,1) or (H,W,3), not {image.dtype} {image.shape}")
    stream = io.BytesIO()
    grey = image.ndim == 3 and image.shape[2] == 1
    Image.fromarray(image[:, :, 0] if grey else image).save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def decode_png(png: bytes) -> np.ndarray:
    """Decode an 8-bit grey or RGB PNG to uint8 (C,H,W)."""
    image = Image.open(io.BytesIO(png), formats=("PNG",))
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"a PNG of mode {image.mode} in a shard; only L and RGB are written")
    pixels = np.asarray(image)
    return pixels[None] if image.mode == "L" else pixels.transpose(2, 0, 1)


# One shard


class ShardFacts(files.FileFacts):
    """Content of a shard's .json.

    places: for each image the offset and the size of its PNG in the tar, its crc32, and its label (-1 = none);
    skipped: names and reasons of images that do not decode (data only). digest: of all the others.
    """

    name: str
    split: str
    start: int
    stop: int
    places: list[list[int]]
    folder: NotRequired[str]
    digest: NotRequired[str]
    skipped: NotRequired[list[list[str]]]


@dataclass(frozen=True)
class Shard:
    """A tar with the images [start, stop) of a split, and a .json with its facts, written after it.

    A tar without facts, or other than they say, is made again. sha256: of the tar, if a manifest lists it.
    """

    folder: Path
    name: str
    split: str
    start: int
    stop: int
    sha256: str = ""

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def facts_json(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def range(self) -> dict[str, Any]:
        return {"split": self.split, "start": self.start, "stop": self.stop}

    def write(self, records: Iterable[Record], **more: Any) -> None:
        """Write the tar, then its facts and `more`."""
        facts = {**self.range, "folder": self.folder.name, **write_tar(self.path, records), **more}
        files.write_json(self.facts_json, {**facts, "digest": hash_content(facts)})

    def read_facts(self, **more: Any) -> ShardFacts | None:
        """Return the facts; None unless the tar is complete, has this range, and the facts say `more`."""
        try:
            facts = files.read_json(self.facts_json, ShardFacts)
            files.require_file(self.path, facts)
        except PipelineError:
            return None
        digest = hash_content({key: value for key, value in facts.items() if key != "digest"})
        own = {"folder": self.folder.name, "digest": digest}  # older facts have neither
        wanted = {**self.range, **more, "count": len(facts["places"])}
        return facts if (own | facts).items() >= (own | wanted).items() else None

    def require_facts(self, **more: Any) -> ShardFacts:
        """Return the facts. Raises PipelineError if the tar has changed since it was made."""
        if (facts := self.read_facts(**more)) is None:
            raise PipelineError(f"{self.path} changed while it was used; run the command again")
        return facts


def write_tar(path: Path, records: Iterable[Record]) -> dict[str, Any]:
    """Write a tar atomically; equal records give equal bytes. Returns name, count, bytes, sha256 and places."""
    from webdataset import TarWriter

    last = ""
    places: list[list[int]] = []
    with files.write_atomically(path) as temporary:
        with temporary.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for record in records:
                if record.key <= last or "." in record.key:
                    raise ValueError(f"key {record.key!r} after {last!r}: keys ascend and hold no dot")
                label = {} if record.label is None else {"cls": str(record.label).encode()}
                tar.write({"__key__": record.key, "png": record.png, **label})
                # The PNG is the last member, padded to whole blocks.
                offset = tar.tarstream.offset - -(-len(record.png) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                places.append([offset, len(record.png), zlib.crc32(record.png), record.number])
                last = record.key
        facts = files.read_file_facts(temporary)
    return {"name": path.name, "count": len(places), **facts, "places": places}


def read_records(path: Path, count: int | None = None) -> Iterator[Record]:
    """Yield the records of a tar, in order.

    Raises PipelineError naming the tar if it is cut or broken, or does not hold `count` records.
    It cannot see a flipped bit in an image: `load_images` compares the sha256 of the manifest first.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    found = 0
    try:
        with path.open("rb") as file:
            # A tar that was cut between two members reads short without an error, but has lost its closing blocks.
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - len(END_OF_TAR)))
            if file.read() != END_OF_TAR:
                raise tarfile.ReadError("truncated: its end-of-archive blocks are missing")
            file.seek(0)
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                label = int(sample["cls"]) if "cls" in sample else None
                yield Record(sample["__key__"], sample["png"], label)
                found += 1
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        raise PipelineError(f"{path} cannot be read ({error}); {files.REMEDY}") from error
    if count is not None and found != count:
        raise PipelineError(f"{path} holds {found} images, not {count}; {files.REMEDY}")


# A folder of shards


class Split(TypedDict):
    count: int
    shards: list[str]


class ShardSetFacts(files.Manifest):
    """The content of the manifest of a folder of shards; protocol: of a sample set."""

    splits: dict[str, Split]
    image_size: int
    channels: int
    protocol: NotRequired[dict[str, Any]]
    official: NotRequired[bool | None]


def write_shard_manifest(
    directory: Path, splits: Mapping[str, Sequence[ShardFacts]], others: Sequence[str] = (), **facts: Any
) -> None:
    """Seal a folder of shards, and other files in it. splits: the facts of the shards of each split, in order."""
    shards = [shard for of_split in splits.values() for shard in of_split]
    names = [*others, *(f"{Path(shard['name']).stem}.json" for shard in shards)]
    listed: dict[str, files.FileFacts] = {name: files.read_file_facts(directory / name) for name in names}
    for shard in shards:
        listed[shard["name"]] = {"bytes": shard["bytes"], "sha256": shard["sha256"], "count": shard["count"]}
    counts = {
        split: {"count": sum(s["count"] for s in of_split), "shards": [s["name"] for s in of_split]}
        for split, of_split in splits.items()
    }
    files.write_manifest(directory, listed, splits=counts, **facts)


def read_shard_manifest(directory: Path, check: files.Check = "seal") -> ShardSetFacts | None:
    """Return the manifest of a folder of shards; None without one. Raises PipelineError if anything differs."""
    manifest = files.read_manifest(directory, ShardSetFacts, check)
    if manifest is None:
        return None
    for split in manifest["splits"].values():
        counts = [facts.get("count", 0) for name in split["shards"] if (facts := manifest["files"].get(name))]
        if len(counts) < len(split["shards"]) or sum(counts) != split["count"]:
            file = directory / files.MANIFEST
            raise PipelineError(f"{file} does not list the images that it counts; {files.REMEDY}")
    return manifest


@dataclass(frozen=True)
class ShardManifest:
    directory: Path
    facts: ShardSetFacts

    @property
    def splits(self) -> list[str]:
        return list(self.facts["splits"])

    def count_images(self, split: str) -> int:
        return int(self._get_split(split)["count"])

    def list_shards(self, split: str, n: int | None = None) -> list[Shard]:
        """Return the shards with the first n images of a split (None: all). PipelineError if there are fewer."""
        there, listed, shards, start = self.count_images(split), self.facts["files"], [], 0
        n = there if n is None else n
        if there < n:
            raise PipelineError(
                f"{self.directory} holds {there} images where {n} are asked for; a short set has no score: "
                "run the stage before this one"
            )
        for name in self._get_split(split)["shards"]:
            stop = start + listed[name]["count"]
            if start < n:
                shards.append(Shard(self.directory, name, split, start, stop, listed[name]["sha256"]))
            start = stop
        return shards

    def read_offsets(self, name: str) -> np.ndarray:
        """Return offset, size, crc32 and label of each image of a shard: int64 (count, 4)."""
        file = (self.directory / name).with_suffix(".json")
        if sealed := self.facts["files"].get(file.name):  # older manifests list the tars alone
            files.require_file(file, sealed)
        facts = files.read_json(file, ShardFacts)
        if facts["sha256"] != self.facts["files"][name]["sha256"]:
            raise PipelineError(f"{file} is not the index of {name}; delete both, run their stage again")
        return np.array(facts["places"], dtype=np.int64).reshape(-1, 4)

    def _get_split(self, split: str) -> Split:
        if split not in self.facts["splits"]:
            known = ", ".join(self.splits)
            raise PipelineError(f"{self.directory} has no {split} split, only {known}; set data.test_images")
        return self.facts["splits"][split]


def open_shards(directory: Path) -> ShardManifest:
    """Read a folder's manifest. Raises PipelineError if it or a shard is missing or has another size."""
    manifest = read_shard_manifest(directory, "size")
    if manifest is None:
        raise PipelineError(f"{directory} holds no finished shards; run the stage that writes them")
    return ShardManifest(directory, manifest)


def load_images(
    directory: Path, split: str, start: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return images [start, stop) of a split, uint8 (n,C,H,W), and labels, int64 (n,), -1 = none.

    Compares the sha256 of each shard it opens. Raises PipelineError naming a shard that differs, or the
    split if it has fewer than `stop` images.
    """
    index = open_shards(directory)
    there = index.count_images(split)
    stop = there if stop is None else stop
    if not 0 <= start < stop <= there:
        raise PipelineError(f"{directory}: no images {start} to {stop}; the {split} split has {there}")
    images: list[np.ndarray] = []
    labels: list[int] = []
    for shard in index.list_shards(split, stop):
        if shard.stop > start:
            files.require_file(shard.path, index.facts["files"][shard.name])
            records = list(read_records(shard.path, shard.count))
            records = records[max(0, start - shard.start) : stop - shard.start]
            images += [decode_png(record.png) for record in records]
            labels += [record.number for record in records]
    return np.stack(images), np.array(labels, dtype=np.int64)
