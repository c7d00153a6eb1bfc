"""Atomic writing, hashing, manifests and locks of files.

Everything is written to a temporary name and renamed, so a file that carries its final name is whole; a
manifest is written last and carries bytes and sha256, so a folder that has one is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
Check = Literal["size", "sha256"]


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What a person can mend and go on; anything else that the system says is a fault of ours.
STORAGE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Raise OSErrors of the body as PipelineError with path and remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        raise PipelineError(
            f"{path} cannot be written ({error.strerror}): make room or mend the storage; the same command goes on"
        ) from error


@contextmanager
def write_atomically(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and is deleted on failure.

    folder: the temporary path is a folder that exists already.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    with explain_write_errors(path):
        try:
            (temporary if folder else path.parent).mkdir(parents=True, exist_ok=True)
            yield temporary
            for file in [*temporary.rglob("*"), temporary]:
                _flush_to_disk(file)
            if folder and path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
            _flush_to_disk(path.parent)
        except BaseException:
            with suppress(OSError):  # it would hide what went wrong
                _delete(temporary)
            raise


def remove_leftovers(directory: Path) -> None:
    """Delete temporary files of killed processes. The caller holds the lock."""
    for path in list(directory.rglob(f"{TEMPORARY}*")):
        _delete(path)


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises PipelineError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PipelineError(f"{path} is not valid JSON ({error}); delete it to have it made again") from error


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays to an .npz atomically."""
    with write_atomically(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz. Raises PipelineError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise PipelineError(f"{path} is damaged ({error}); delete it to have it made again") from error


def write_unit_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a unit's arrays, with its folder and name inside, so that a wrong file is noticed."""
    write_arrays(path, unit=np.array(f"{path.parent.name}/{path.stem}"), **arrays)


def read_unit_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return a unit's arrays. Raises PipelineError where the file is damaged or of another unit."""
    arrays = read_arrays(path)
    unit, expected = str(arrays.pop("unit", "no unit")), f"{path.parent.name}/{path.stem}"
    if unit != expected:
        raise PipelineError(f"{path} holds {unit}, not {expected}; delete it to have it made again")
    return arrays


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileFacts(TypedDict):
    """Size and sha256 of a file, as a manifest lists them."""

    bytes: int
    sha256: str


def read_file_facts(path: Path) -> FileFacts:
    """Return the size and the sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def write_manifest(directory: Path, names: Iterable[str], **facts: Any) -> None:
    """Seal a folder: write its manifest with bytes and sha256 of the named files, and `facts`."""
    files = {name: read_file_facts(directory / name) for name in names}
    write_json(directory / MANIFEST, {"files": files, **facts})


def read_manifest(directory: Path, check: Check = "size") -> dict[str, Any] | None:
    """Return the manifest of a folder after checking its files; None without one.

    Raises PipelineError naming the first file that is missing or differs.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest: dict[str, Any] = read_json(path)
    for name, facts in manifest["files"].items():
        require_file(directory / name, facts, check)
    return manifest


def read_manifest_or_none(directory: Path, check: Check = "size") -> dict[str, Any] | None:
    """Return the manifest of what can be made again; None, with a warning, where a file differs."""
    try:
        return read_manifest(directory, check)
    except PipelineError as error:
        log.warning("%s; it is made again", error)
        return None


def require_file(path: Path, facts: Mapping[str, Any], check: Check = "sha256") -> None:
    """Raise PipelineError unless `path` is the file that `facts` describes."""
    if not path.exists():
        fault = "is missing although its manifest lists it"
    elif (size := path.stat().st_size) != facts["bytes"]:
        fault = f"has {size} bytes, its manifest says {facts['bytes']}"
    elif check == "sha256" and hash_file(path) != facts["sha256"]:
        fault = "does not match its sha256"
    else:
        return
    raise PipelineError(f"{path} {fault}; delete {path.parent} to rebuild")


@contextmanager
def lock_folder(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock during the body: one driver at a time. The kernel frees it when its holder dies.

    Raises PipelineError where another holds it, or waits for that one to finish.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise PipelineError(
                f"{path} is being worked on by another command (process {holder}); wait for it, or stop it"
            ) from None
        with explain_write_errors(path / ".lock"):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Return whether a driver holds the folder's lock."""
    with suppress(OSError), (path / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
