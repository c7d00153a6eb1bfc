"""Image files in a folder: flat, or one sub-folder for each class; any format that Pillow reads.

A folder that holds train/ and test/ (or train/ alone) takes its splits from there; from any other,
data.test_images are held out by a fixed shuffle. Classes are numbered in the order of their folders' names.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.content import digest_of
from pipeline.data.sources.order import held_out, shuffled
from pipeline.data.sources.picture import Picture, readable
from pipeline.errors import PipelineError


class Folder:
    """Images are taken in shuffled order, so that any first n of a split mix the classes."""

    def __init__(self, data: DataConfig):
        assert data.path is not None  # DataConfig refuses it
        self._root = Path(data.path)
        self._test_images, self._labelled = data.test_images, data.labels > 0
        if not self._root.is_dir():
            raise PipelineError(f"{self._root} is no folder; set data.path to the folder with the images")
        self._files = {split: _images_in(folder) for split, folder in _split_folders(self._root).items()}
        for split, files in self._files.items():
            if not files:
                raise PipelineError(f"{self._root} has no images in its {split} split; set data.path")

    def files(self) -> list[Path]:
        return sorted(file for files in self._files.values() for file in files)

    def digest(self) -> str:
        return digest_of(self.files(), self._root)

    @cached_property
    def splits(self) -> dict[str, int]:
        return {split: len(indices) for split, (_, indices) in self._order.items()}

    def pictures(self, split: str, start: int, stop: int) -> Iterator[Picture]:
        origin, indices = self._order[split]
        for i in indices[start:stop]:
            file = self._files[origin][i]
            yield Picture(str(file), _bytes_of(file), self._label(origin, file))

    @cached_property
    def _order(self) -> dict[str, tuple[str, np.ndarray]]:
        """split -> (whose files, indices into them)."""
        if "test" in self._files:
            return {split: (split, shuffled(len(files))) for split, files in self._files.items()}
        splits = held_out(self._root, len(self._files["train"]), self._test_images)
        return {split: ("train", indices) for split, indices in splits.items()}

    @cached_property
    def _classes(self) -> dict[str, int]:
        folder = _split_folders(self._root)["train"]
        names = sorted({_class_of(file, folder) for file in self._files["train"]})
        return {name: number for number, name in enumerate(names)}

    def _label(self, origin: str, file: Path) -> int | None:
        if not self._labelled:
            return None
        name = _class_of(file, _split_folders(self._root)[origin])
        if name not in self._classes:
            raise PipelineError(f"{file} has the class '{name}', which train/ lacks; move or remove it")
        return self._classes[name]


def _split_folders(root: Path) -> dict[str, Path]:
    folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if {"train", "test"} <= folders:
        return {"train": root / "train", "test": root / "test"}
    return {"train": root / "train" if folders == {"train"} else root}


def _images_in(folder: Path) -> list[Path]:
    """All image files at any depth, hidden ones left out, sorted by path."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(place, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in readable()
        ]
    return sorted(found)


def _class_of(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts
    if len(parts) == 1:
        raise PipelineError(f"{file} lies in no class folder; move it into one, or set data.labels=0")
    return parts[0]


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise PipelineError(f"{file} cannot be read ({error.strerror}); restore it or remove it") from error
