"""Image files in a folder: flat, or one sub-folder for each class; any format that Pillow reads.

Folders whose names say train, and test or else val (`base.find_split`), are the splits; from any other set,
data.test_images are set aside by a fixed permutation. Classes are numbered in the order of their folders' names. Of a
file with several pictures (a TIFF stack, an animation) the first one is read.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.base import WORDS, ImageSource, find_split, list_files, translate_read_errors
from pipeline.data.sources.raw_image import RawImage, is_image_file
from pipeline.errors import PipelineError

MAX_BYTES = 2**30  # of one encoded image
Parts = tuple[str, ...]


class FolderSource(ImageSource):
    def __init__(self, data: DataConfig):
        super().__init__(data)
        self.order, self._labelled = "shuffled", data.labels > 0
        if not self.root.is_dir():
            raise PipelineError(f"{self.root} is no folder; set data.path to the folder with the images")
        found, self.skipped = list_files(self.root, is_image_file)
        if not found:
            raise PipelineError(f"{self.root} has no images in its train split; set data.path")
        folders = {self._split_path(file)[:-1] for file in found}
        self._folders, self.notes = _find_split_folders(self.root, folders)
        self._parts: dict[str, list[Path]] = {split: [] for split in self._folders}
        self.files = []
        for file in found:
            parts = self._split_path(file)
            split = next((s for s, folder in self._folders.items() if parts[: len(folder)] == folder), None)
            if split:
                self._parts[split].append(file)
                self.files.append(file)
            else:
                self.skipped[f"in {parts[0]}, outside of the splits"] += 1
        if self._labelled:
            self.classes = sorted({self._find_class_name("train", file) for file in self._parts["train"]})
            train = self.root.joinpath(*self._folders["train"])
            empty = _list_folders(train) - set(self.classes)
            self.notes += [f"{train / name} holds no image, and is no class" for name in sorted(empty)]
        old = _find_split_folders_as_before(self.root)
        if self._folders != old and (self._labelled or len(self._folders) > 1):
            self.layout = str(sorted(self._folders.items()))

    def count_images(self) -> dict[str, int]:
        return {part: len(files) for part, files in self._parts.items()}

    def read_images(self, part: str, indices: np.ndarray) -> Iterator[RawImage]:
        for file in (self._parts[part][i] for i in indices):
            with translate_read_errors():
                if file.stat().st_size > MAX_BYTES:
                    raise PipelineError(f"{file} is larger than {MAX_BYTES} bytes, as no image is; remove it")
                content = file.read_bytes()
            yield RawImage(str(file), content, self._find_label(part, file) if self._labelled else None)

    def _split_path(self, file: Path) -> Parts:
        return file.parts[len(self.root.parts) :]  # of a million files, relative_to() would take a while

    def _find_label(self, part: str, file: Path) -> int:
        name = self._find_class_name(part, file)
        if name not in self.classes:
            raise PipelineError(f"{file} has the class '{name}', which train/ lacks; move or remove it")
        return self.classes.index(name)

    def _find_class_name(self, part: str, file: Path) -> str:
        parts = self._split_path(file)[len(self._folders[part]) :]
        if len(parts) == 1:
            raise PipelineError(f"{file} lies in no class folder; move it into one, or set data.labels=0")
        return parts[0]


def _list_folders(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."}


def _find_split_folders_as_before(root: Path) -> dict[str, Parts]:
    """Return the splits as an earlier version found them: if both agree, a set keeps its old fingerprint."""
    names = _list_folders(root)
    if {"train", "test"} <= names:
        return {"train": ("train",), "test": ("test",)}
    return {"train": ("train",) if names == {"train"} else ()}


def _find_split_folders(root: Path, folders: set[Parts]) -> tuple[dict[str, Parts], list[str]]:
    """Return the folder of each split, as parts below `root`, and notes for the user.

    folders: those that hold images. Raises PipelineError if the splits are ambiguous.
    """
    found: defaultdict[str, set[Parts]] = defaultdict(set)
    others = False
    for parts in folders:
        depth, split = next(((i, s) for i, name in enumerate(parts, 1) if (s := find_split(name))), (0, ""))
        if split:
            found[split].add(parts[:depth])
        elif parts:
            others = True
    names = ", ".join(sorted("/".join(place) for places in found.values() for place in places)[:9])
    if others:  # then "bullet_train" is a class too, and only a name such as "train" is a split
        for split, places in found.items():
            found[split] = {place for place in places if place[-1].lower() in WORDS[split]}
    train, held_out = found["train"], found["test"] or found["val"]
    if held_out and not train and not others:
        raise PipelineError(f"{root} has no train split, only {names}; set data.path to another set")
    if not train or (not held_out and (others or len(train) > 1)):
        note = f"{names} and the files beside are read as one set for training: no folder is a split"
        return {"train": ()}, [note] if names else []
    splits = {"train": train} | ({"test": held_out} if held_out else {})
    chosen = {s: min(places, key=lambda p: (p != (s,), p)) for s, places in splits.items()}
    several = any(len(places) > 1 and chosen[s] != (s,) for s, places in splits.items())
    if several or len({place[:-1] for place in chosen.values()}) > 1:
        raise PipelineError(f"{root} has several folders for a split ({names}); set data.path to one set")
    return chosen, []
