"""Images in NumPy arrays.

`data.path` is a folder with `images.npy`, or with `train_images.npy` and `test_images.npy`, or a single
`*.npy` file of images. Labels stand beside the images under the same name with `labels` for `images`
(`train_labels.npy`); beside a file whose name lacks `images`, under `<name>_labels.npy`.

images: uint8, (N,H,W,C) or grey (N,H,W). labels: integers (N,) or (N,1), or one-hot (N,K). Nothing pickled.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.content import digest_of
from pipeline.data.sources.order import held_out
from pipeline.data.sources.picture import Picture
from pipeline.errors import PipelineError


class Npy:
    """Arrays, read in place. Without `test_images.npy`, data.test_images are held out by a fixed shuffle."""

    def __init__(self, data: DataConfig):
        assert data.path is not None  # DataConfig refuses it
        root = Path(data.path)
        self._test_images, self._labelled = data.test_images, data.labels > 0
        if root.is_file():
            self._images = {"train": root}
        else:
            candidates = {"train": root / "train_images.npy", "test": root / "test_images.npy"}
            if not candidates["train"].is_file():
                candidates = {"train": root / "images.npy"}
            self._images = {split: file for split, file in candidates.items() if file.is_file()}
        if not self._images:
            raise PipelineError(f"{root} holds neither images.npy nor train_images.npy; set data.path")
        labelled = self._images.items() if self._labelled else ()
        self._labels = {split: _labels_of(file) for split, file in labelled}

    def files(self) -> list[Path]:
        return sorted([*self._images.values(), *self._labels.values()])

    def digest(self) -> str:
        return digest_of(self.files(), self._images["train"].parent)

    @cached_property
    def splits(self) -> dict[str, int]:
        return {split: len(indices) for split, (_, indices) in self._arrays.items()}

    def pictures(self, split: str, start: int, stop: int) -> Iterator[Picture]:
        origin, indices = self._arrays[split]
        file = self._images[origin]
        images, labels = self._loaded[origin]
        for i in indices[start:stop]:
            label = None if labels is None else int(labels[i])
            yield Picture(f"{file} image {i}", np.asarray(images[i]), label)

    @cached_property
    def _arrays(self) -> dict[str, tuple[str, np.ndarray]]:
        """split -> (which file, indices into it)."""
        if "test" in self._images:
            return {split: (split, np.arange(len(images))) for split, (images, _) in self._loaded.items()}
        splits = held_out(self._images["train"], len(self._loaded["train"][0]), self._test_images)
        return {split: ("train", indices) for split, indices in splits.items()}

    @cached_property
    def _loaded(self) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        return {split: self._load(split) for split in self._images}

    def _load(self, split: str) -> tuple[np.ndarray, np.ndarray | None]:
        images = _as_images(self._images[split])
        if not self._labelled:
            return images, None
        labels = _as_classes(self._labels[split])
        if len(labels) != len(images):
            raise PipelineError(f"{self._labels[split]} has {len(labels)} labels for {len(images)} images")
        return images, labels


def _labels_of(images: Path) -> Path:
    stem = images.stem
    name = "labels".join(stem.rsplit("images", 1)) if "images" in stem else f"{stem}_labels"
    file = images.with_name(f"{name}.npy")
    if not file.is_file():
        raise PipelineError(f"{file}, the labels of {images.name}, is missing; save it, or set data.labels=0")
    return file


def _load(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise PipelineError(f"{file} is no readable array ({error}); write it with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise PipelineError(f"{file} holds several arrays; write each with numpy.save")
    return array


def _as_images(file: Path) -> np.ndarray:
    images = _load(file)
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise PipelineError(
            f"{file} is {images.dtype} {images.shape}; uint8 (N,H,W,C) with C = 1 or 3 and N > 0 is expected"
        )
    return images


def _as_classes(file: Path) -> np.ndarray:
    labels = np.asarray(_load(file))
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and np.all((labels == 0) | (labels == 1)) and np.all(labels.sum(axis=1) == 1):
        return labels.argmax(axis=1)
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        return labels
    raise PipelineError(f"{file} is {labels.dtype} {labels.shape}; expected integers (N,) or one-hot (N,K)")
