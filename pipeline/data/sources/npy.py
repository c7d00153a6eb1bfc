"""Images in NumPy arrays.

`data.path` is a folder with `images.npy`, or with `train_images.npy` and `test_images.npy`, or a single file of images.
Labels are in the same folder: the name with `labels` for `images`, or `<name>_labels.npy` for any other name.
images: uint8, (N,H,W,C) or grey (N,H,W). labels: integers (N,) or (N,1), or one-hot (N,K). Nothing pickled.
"""

from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.base import ArraySource
from pipeline.errors import PipelineError


class NpySource(ArraySource):
    """NumPy files, memory-mapped. Without test_images.npy, data.test_images images are the test split."""

    def __init__(self, data: DataConfig):
        super().__init__(data)
        root = self.root
        found = {part: root / f"{part}_images.npy" for part in ("train", "test")}
        if not found["train"].is_file():
            found = {"train": root if root.is_file() else root / "images.npy"}
        self._images = {part: file for part, file in found.items() if file.is_file()}
        if not self._images:
            raise PipelineError(f"{root} holds neither images.npy nor train_images.npy; set data.path")
        self._labels = {part: _find_labels(file) for part, file in self._images.items() if data.labels}
        self.files = sorted([*self._images.values(), *self._labels.values()])
        unused = sorted(file.name for file in root.glob("*.npy") if file not in self.files)
        self.skipped = dict.fromkeys(unused, 1)
        self.root, self.order = self._images["train"].parent, "shuffled if held out"

    @cached_property
    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        arrays = {}
        for part, file in self._images.items():
            images = _load_images(file)
            labels = _load_labels(self._labels[part]) if self._labels else None
            if labels is not None and len(labels) != len(images):
                raise PipelineError(f"{self._labels[part]} has {len(labels)} labels for {len(images)} images")
            arrays[part] = images, labels
        return arrays

    def read_labels(self, part: str) -> np.ndarray | None:
        with suppress(PipelineError):  # without labels their order is unknown
            return _load_labels(_find_labels(self._images[part]))
        return None


def _find_labels(images: Path) -> Path:
    stem = images.stem
    name = "labels".join(stem.rsplit("images", 1)) if "images" in stem else f"{stem}_labels"
    file = images.with_name(f"{name}.npy")
    if not file.is_file():
        raise PipelineError(f"{file}, the labels of {images.name}, is missing; save it, or set data.labels=0")
    return file


def _load_array(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    # A broken header raises nearly anything, and NumPy's advice is to load it unsafely.
    except Exception as error:
        raise PipelineError(f"{file} is no readable array of numbers; write it with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise PipelineError(f"{file} holds several arrays; write each with numpy.save")
    return array


def _load_images(file: Path) -> np.ndarray:
    """Return uint8 (N,H,W,C), mapped from the file."""
    images = _load_array(file)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise PipelineError(
            f"{file} is {images.dtype} {images.shape}; uint8 (N,H,W,C) with C = 1 or 3 and N > 0 is expected"
        )
    return images


def _load_labels(file: Path) -> np.ndarray:
    """Return the classes, integers (N,)."""
    labels = np.asarray(_load_array(file))
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and np.all((labels == 0) | (labels == 1)) and np.all(labels.sum(axis=1) == 1):
        return labels.argmax(axis=1)
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        return labels
    raise PipelineError(f"{file} is {labels.dtype} {labels.shape}; expected integers (N,) or one-hot (N,K)")
