"""Image files in a folder: flat, or one sub-folder for each class; any format that Pillow reads.

A folder that holds train/ and test/ (or train/ alone) takes its splits from there; from any other,
data.test_images are set aside by a fixed permutation. Classes are numbered in the order of their folders' names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.base import ImageSource, explain_read_errors
from pipeline.data.sources.raw_image import RawImage, list_image_extensions
from pipeline.errors import PipelineError


class FolderSource(ImageSource):
    """Image files in a folder, or in one sub-folder for each class."""

    def __init__(self, data: DataConfig):
        assert data.path is not None  # DataConfig refuses it
        self.root, self.order, self._labelled = Path(data.path), "shuffled", data.labels > 0
        if not self.root.is_dir():
            raise PipelineError(f"{self.root} is no folder; set data.path to the folder with the images")
        inside = {entry.name for entry in self.root.iterdir() if entry.is_dir() and entry.name[0] != "."}
        if {"train", "test"} <= inside:
            self._folders = {part: self.root / part for part in ("train", "test")}
        else:
            self._folders = {"train": self.root / "train" if inside == {"train"} else self.root}
        self._parts = {part: _list_image_files(folder) for part, folder in self._folders.items()}
        for part, files in self._parts.items():
            if not files:
                raise PipelineError(f"{self.root} has no images in its {part} split; set data.path")
        self.files = sorted(file for files in self._parts.values() for file in files)

    def count_images(self) -> dict[str, int]:
        return {part: len(files) for part, files in self._parts.items()}

    def read_images(self, part: str, indices: np.ndarray) -> Iterator[RawImage]:
        for file in (self._parts[part][i] for i in indices):
            with explain_read_errors():
                content = file.read_bytes()
            yield RawImage(str(file), content, self._find_label(part, file) if self._labelled else None)

    def _find_label(self, part: str, file: Path) -> int:
        name = _find_class_name(file, self._folders[part])
        if name not in self._classes:
            raise PipelineError(f"{file} has the class '{name}', which train/ lacks; move or remove it")
        return self._classes[name]

    @cached_property
    def _classes(self) -> dict[str, int]:
        names = {_find_class_name(file, self._folders["train"]) for file in self._parts["train"]}
        return {name: number for number, name in enumerate(sorted(names))}


def _list_image_files(folder: Path) -> list[Path]:
    """List all image files at any depth, hidden ones left out, sorted by path."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(place, name) for name in names if name[0] != "."]
    return sorted(file for file in found if file.suffix.lower() in list_image_extensions())


def _find_class_name(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts
    if len(parts) == 1:
        raise PipelineError(f"{file} lies in no class folder; move it into one, or set data.labels=0")
    return parts[0]
