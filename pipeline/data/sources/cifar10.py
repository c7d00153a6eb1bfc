"""CIFAR-10: 50,000 + 10,000 colour images of 32x32 pixels in ten classes.

`data.path` is a folder with the Hugging Face parquet files, the official `cifar-10-python.tar.gz`, or its
unpacked `cifar-10-batches-py`; null = the official archive is downloaded. The parquet files hold the images
in another order and have another fingerprint; the official forms share one.
"""

import hashlib
import io
import logging
import pickle
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.base import ArraySource, ImageSource, translate_parse_errors
from pipeline.data.sources.parquet import ParquetSource
from pipeline.errors import PipelineError
from pipeline.store.files import write_atomically
from pipeline.store.tars import ShardFacts, decode_png

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE, UNPACKED = "cifar-10-python.tar.gz", "cifar-10-batches-py"
REMEDY = f"fetch it again from {ADDRESS}"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
MAX_BYTES = 2**25  # of a batch; the largest has 31,035,999
BATCHES = {  # md5 of each, as they are in the official archive
    "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e",
}  # fmt: skip
PIXELS = {  # of each split: its images, and the sha256 over the sorted sha256 of their pixels, uint8 (3,32,32)
    "train": (50_000, "c4f3d45acfc15350af7065445e9de41001417180428b1d37e2fa37e634414112"),
    "test": (10_000, "2b47ae852d2a691a0f721e2b78f55dfba705c73504ae93a00eda74c8e562b1a8"),
}
ALLOWED = {  # names that the pickles may load
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip

log = logging.getLogger(__name__)


def open_cifar10(data: DataConfig) -> ImageSource:
    """Open CIFAR-10 in the form that is at `data.path`."""
    if data.path is None:
        raise PipelineError("CIFAR-10 is not downloaded yet; `ddpm shard` downloads it, or set data.path")
    root = Path(data.path)
    if not root.exists():
        raise PipelineError(f"{root} does not exist; set data.path to CIFAR-10, or to null to download it")
    place = next((place for place in (root / UNPACKED, root / ARCHIVE) if place.exists()), root)
    is_parquet = place.is_dir() and place == root and not (root / "data_batch_1").exists()
    return ParquetSource(data) if is_parquet else Cifar10Batches(data, place)


def is_official(folder: Path, splits: Mapping[str, Sequence[ShardFacts]]) -> bool:
    """Return whether the shards of a folder hold the pixels of CIFAR-10, in any order and from any source."""
    for split, (count, expected) in PIXELS.items():
        shards = splits.get(split, [])
        tars = (((folder / shard["name"]).read_bytes(), shard["places"]) for shard in shards)
        pngs = (tar[offset : offset + size] for tar, places in tars for offset, size, *_ in places)
        images = map(decode_png, pngs)
        if sum(shard["count"] for shard in shards) != count or hash_images(images) != expected:
            return False
    return True


def hash_images(images: Iterable[np.ndarray]) -> str:
    """Return the sha256 over the sorted sha256 of each image's pixels, so that their order does not matter."""
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(i.tobytes()).digest() for i in images))).hexdigest()


def download_archive(folder: Path) -> Path:
    """Download the archive into `folder` unless it is there, and verify its md5."""
    archive = folder / ARCHIVE
    if archive.exists() and _compute_md5(archive) == ARCHIVE_MD5:
        return archive
    log.warning("downloading %s (170 MB) to %s", ADDRESS, archive)
    with write_atomically(archive) as temporary:
        try:
            with urllib.request.urlopen(ADDRESS, timeout=30) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except OSError as error:
            remedy = "fetch it elsewhere and set data.path to the file, or to a folder with parquet files"
            raise PipelineError(f"{ADDRESS} cannot be downloaded ({error}); {remedy}") from error
        if (found := _compute_md5(temporary)) != ARCHIVE_MD5:
            raise PipelineError(f"{ADDRESS} has md5 {found}, not {ARCHIVE_MD5}; run the command again")
    return archive


def _compute_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def hash_batches(md5: Mapping[str, str] = BATCHES) -> str:
    """Compute the fingerprint from the md5 of each batch, by default those of the archive, which need not be there."""
    return hashlib.sha256("".join(f"{name} {md5[name]}\n" for name in BATCHES).encode()).hexdigest()


class Cifar10Batches(ArraySource):
    """CIFAR-10's python files, in the archive or unpacked; kept in memory after reading (184 MB)."""

    def __init__(self, data: DataConfig, root: Path):
        super().__init__(data)
        self.root, self.files = root, [root]
        if root.is_dir():
            self.files = [root / name for name in BATCHES if (root / name).exists()]

    def compute_fingerprint(self) -> str:
        batches = self._read_batches()
        return hash_batches({name: hashlib.md5(content).hexdigest() for name, content in batches})

    @cached_property
    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        batches = {name: _parse(content, f"{self.root} {name}") for name, content in self._read_batches()}
        test = batches.pop("test_batch")
        train = [batches[name] for name in sorted(batches)]
        images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
        return {"train": (images, labels), "test": test}

    def _read_batches(self) -> Iterator[tuple[str, bytes]]:
        """Yield name and bytes of each batch; raise PipelineError naming a missing or unreadable one."""
        missing = set(BATCHES)
        batches = _read_unpacked(self.files) if self.root.is_dir() else _read_archive(self.root)
        try:
            for name, content in batches:
                missing.discard(name)
                yield name, content
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise PipelineError(f"{self.root} cannot be read ({error}); {REMEDY}") from error
        if missing:
            raise PipelineError(f"{self.root} lacks {min(missing)}; {REMEDY}")


def _read_unpacked(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    for file in files:
        _require_size(file.name, file.stat().st_size)
        yield file.name, file.read_bytes()


def _read_archive(archive: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive, "r|*", tarinfo=_SmallMember) as tar:
        for member in tar:
            _require_size(member.name, member.size)  # its extended header may name another size
            name, content = Path(member.name).name, tar.extractfile(member)
            if content and name in BATCHES:
                yield name, content.read()


class _SmallMember(tarfile.TarInfo):
    """A header of the archive, also an extended one; it is refused if it names a size that no file of CIFAR-10 has."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_SmallMember":
        found = super().frombuf(buf, encoding, errors)
        _require_size(found.name, found.size)
        return found


def _require_size(name: str, size: int) -> None:
    if size > MAX_BYTES:
        raise tarfile.ReadError(f"{name} has {size:,} bytes, a batch has 31 million")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that allows only NumPy arrays, bytes and plain containers."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of images needs")
        # NumPy 2 moved numpy.core and warns at its old name.
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _parse(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 (n,32,32,3) and int64 (n,) of one batch, whose rows hold the red, green and blue planes."""
    with translate_parse_errors(name, "CIFAR-10 batch", REMEDY):
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images = batch[b"data"]
        labels = np.fromiter(batch[b"labels"], np.int64, len(batch[b"labels"]))  # no list in a list
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
            raise ValueError(f"{images.dtype} {images.shape} for {len(labels)} labels")
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
