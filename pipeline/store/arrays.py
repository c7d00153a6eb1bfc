"""Arrays in .npz files, and those that a unit writes."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.errors import PipelineError
from pipeline.store.files import REMEDY, require_regular_file, try_read, write_atomically


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    with write_atomically(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz. Raises PipelineError if it is damaged."""
    try:
        with np.load(require_regular_file(path), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise PipelineError(f"{path} is damaged ({error}); {REMEDY}") from error


def write_unit_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a unit's arrays, with its folder and name inside, so that a wrong file is noticed."""
    write_arrays(path, unit=np.array(f"{path.parent.name}/{path.stem}"), **arrays)


def read_unit_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return a unit's arrays. Raises PipelineError if the file is damaged or of another unit."""
    arrays = read_arrays(path)
    unit, expected = str(arrays.pop("unit", "no unit")), f"{path.parent.name}/{path.stem}"
    if unit != expected:
        raise PipelineError(f"{path} holds {unit}, not {expected}; {REMEDY}")
    return arrays


def is_unit_done(path: Path, read: Callable[[Path], object] = read_unit_arrays) -> bool:
    """Return whether a unit's file is there and whole."""
    return path.exists() and try_read(read, path) is not None
