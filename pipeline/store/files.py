"""Atomic writing, hashing, manifests and locks of files.

A result is written under a temporary name and renamed, so a file with its final name is whole (logs grow line by line).
A manifest with sizes and sha256 is written last, so a folder that has one is complete. Code that shows, sends or uses a
file compares its sha256. To see that work is done, `.sealed.json` is enough: it has the size and times of each file
when it was compared.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NotRequired, ParamSpec, TypeVar

import psutil
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 on

from pipeline.errors import PipelineError, TransientError

log = logging.getLogger(__name__)

MANIFEST, SEALED = "manifest.json", ".sealed.json"
TEMPORARY = ".tmp-"
USER_VARIABLE = "DDPM_USER"
REMEDY = "the command that made it makes it again"
Check = Literal["size", "seal", "sha256"]
_ADAPTERS: dict[object, TypeAdapter[Any]] = {}
P = ParamSpec("P")
T = TypeVar("T")
os.umask(UMASK := os.umask(0))  # it cannot be read alone; no thread writes yet


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Errors that a user can repair; any other error of the system is a bug of this program.
STORAGE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
STORAGE_FAULTS |= TRANSIENT | {errno.EISDIR, errno.ENOTDIR, errno.EINVAL}  # something else has its name


@contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Raise OSErrors of the body as PipelineError with path and remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        kind = TransientError if error.errno in TRANSIENT else PipelineError
        raise kind(
            f"{path} cannot be written ({error.strerror}): make room or repair the storage; the same command continues"
        ) from error


@contextmanager
def write_atomically(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and is deleted on failure.

    folder: the temporary path is a folder that exists already.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    with translate_write_errors(path):
        try:
            (temporary if folder else path.parent).mkdir(parents=True, exist_ok=True)
            yield temporary
            for file in [*temporary.rglob("*"), temporary]:
                if file.is_file():
                    file.chmod(0o666 & ~UMASK)  # safetensors lets only the owner read it
                _flush_to_disk(file)
            _replace(temporary, path)
            _flush_to_disk(path.parent)
        except BaseException:
            with suppress(OSError):  # it would hide what went wrong
                _delete(temporary)
            raise


def remove_leftovers(directory: Path) -> None:
    """Delete temporary files of killed processes. The caller holds the lock."""
    for path in list(directory.rglob(f"{TEMPORARY}*")):
        _delete(path)


def _replace(new: Path, path: Path) -> None:
    """Rename `new` to `path`; replace a folder of that name, even one to which another thread adds `.sealed.json`."""
    while True:
        try:
            new.replace(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            delete_folder(path)


def delete_folder(path: Path) -> None:
    """Delete a folder, if it is there. It is renamed first, so that a reading thread sees all of it or nothing."""
    with suppress(FileNotFoundError):
        _delete(path.replace(path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")))


def _delete(path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def require_regular_file(path: Path) -> Path:
    """Return the path. Raises OSError if it is no regular file: opening a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return path


def read_json(path: Path, shape: type[T], remedy: str = REMEDY) -> T:
    """Read a JSON file. Raises PipelineError if it is damaged, or not of the shape (see `parse_json`)."""
    try:
        return parse_json(require_regular_file(path).read_bytes(), shape, path, remedy)
    except OSError as error:
        raise PipelineError(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def parse_json(text: bytes, shape: type[T], name: object, remedy: str = REMEDY) -> T:
    """Return the content of JSON text, which must be of the shape: a TypedDict, a dict or a list of some type.

    Keys that a TypedDict does not name stay. Raises PipelineError with the first fault.
    """
    try:
        adapter = _ADAPTERS.get(shape) or _ADAPTERS.setdefault(shape, TypeAdapter(shape))
        adapter.validate_json(text, strict=True)
        content: T = json.loads(text)
        return content
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            fault = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}"
        raise PipelineError(f"{name} is damaged ({reason}); {remedy}") from error


def try_read(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Return the result of `read`; if the file is damaged and can be made again, warn and return None."""
    try:
        return read(*args, **kwargs)
    except PipelineError as error:
        warn_once(str(error))
        return None


@cache
def warn_once(problem: str) -> None:
    """Warn of a damaged file, once per process."""
    log.warning("%s", problem)


def read_record(path: Path, shape: type[T]) -> T:
    """Return the content of a file that holds no result; empty if it is missing or, with a warning, if damaged."""
    return (try_read(read_json, path, shape, "it is started again") if path.exists() else None) or shape()


def require_output(path: Path, folder: bool = False) -> None:
    """Raise PipelineError unless a command can write its output here: a file, or a folder that is new or empty."""
    fits = path.is_dir() and not any(path.iterdir()) if folder else path.is_file()
    if os.path.lexists(path) and not fits:
        kind = "an empty folder" if folder else "a file"
        raise PipelineError(f"{path} exists already and is not {kind}; give another name")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "cannot be written" if above.is_dir() else "is no folder"
        raise PipelineError(f"{path} cannot be made: {above} {reason}; give another name")


def hash_file(path: Path) -> str:
    with require_regular_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileFacts(TypedDict):
    """Size and sha256 of a file, as a manifest lists them; of a tar also how many images it has."""

    bytes: int
    sha256: str
    count: NotRequired[int]


def read_file_facts(path: Path) -> FileFacts:
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


class Manifest(TypedDict):
    """Keys of every manifest; folder: the name of its folder, which contains its key."""

    files: dict[str, FileFacts]
    folder: NotRequired[str]


class PageManifest(Manifest):
    """Manifest of a run's page: the hash of the files that it shows, and its first sentence."""

    inputs: NotRequired[str]
    verdict: NotRequired[str]


class FiguresManifest(Manifest):
    """Manifest of the figures: their order, captions and results, and the reasons for those that are missing."""

    order: list[str]
    captions: dict[str, str]
    findings: NotRequired[dict[str, str]]
    skipped: NotRequired[dict[str, str]]
    scored: NotRequired[bool]


M = TypeVar("M", bound=Manifest)


def write_manifest(directory: Path, names: Iterable[str] | Mapping[str, FileFacts], **facts: Any) -> None:
    """Seal a folder: write its manifest with `facts`, and bytes and sha256 of the files (computed if only named)."""
    known = names if isinstance(names, Mapping) else {}
    files = known or {name: read_file_facts(directory / name) for name in names}
    if directory.name.startswith(TEMPORARY):  # its name is still to come
        return write_json(directory / MANIFEST, {"files": files, **facts})
    write_json(directory / MANIFEST, {"files": files, "folder": directory.name, **facts})
    note_times(directory / MANIFEST, files)


def note_times(manifest: Path, files: Mapping[str, FileFacts]) -> None:
    """Write `.sealed.json`: size, times and hash of a manifest and of its files, which were just compared."""
    hashes = {name: facts["sha256"] for name, facts in files.items()} | {manifest.name: hash_file(manifest)}
    stamps = {name: _make_stamp(manifest.parent / name, sha256) for name, sha256 in hashes.items()}
    write_json(manifest.with_name(SEALED), stamps)


def _make_stamp(path: Path, sha256: str | int) -> list[int | str]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, sha256]


def read_manifest(directory: Path, shape: type[M], check: Check = "seal") -> M | None:
    """Return the manifest of a folder after checking its files; None without one.

    Raises PipelineError naming the first file that is missing or differs.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path, shape)
    if (folder := manifest.get("folder", directory.name)) != directory.name:
        raise PipelineError(f"{path} is the manifest of {folder}; {REMEDY}")
    require_files(path, manifest["files"], check)
    return manifest


def require_files(manifest: Path, files: Mapping[str, FileFacts], check: Check) -> None:
    """Raise PipelineError naming the first file of a manifest that is missing or differs.

    check "seal": hash only files whose size or times differ from `.sealed.json`, and then write that again.
    """
    folder, sealed = manifest.parent, read_record(manifest.with_name(SEALED), dict[str, list[int | str]])
    own, changed = sealed.get(manifest.name), False
    if own and own != _make_stamp(manifest, own[-1]) and hash_file(manifest) != own[-1]:
        raise PipelineError(f"{manifest} changed after it was sealed; {REMEDY}")
    for name, facts in files.items():
        path = folder / name
        is_sealed = path.is_file() and sealed.get(name) == _make_stamp(path, facts["sha256"])
        changed |= not is_sealed
        needed: Check = "size" if is_sealed else "sha256"
        require_file(path, facts, needed if check == "seal" else check)
    if (changed or not own) and check != "size":
        with suppress(OSError, PipelineError):  # if it cannot be written, the files are hashed again
            note_times(manifest, files)


def require_sealed(path: Path) -> Path:
    """Return the path. Raises PipelineError unless its file agrees with the manifest beside it."""
    files = read_json(path.with_name(MANIFEST), Manifest)["files"]
    if path.name not in files:
        raise PipelineError(f"{path} is not in the manifest beside it; {REMEDY}")
    require_file(path, files[path.name])
    return path


def read_sealed(path: Path, shape: type[T]) -> T:
    """Read a JSON file after comparing it with the manifest beside it. Raises PipelineError if it differs."""
    return read_json(require_sealed(path), shape)


def require_file(path: Path, facts: FileFacts, check: Check = "sha256") -> None:
    """Raise PipelineError unless `path` is the file that `facts` describes."""
    if not path.is_file():
        fault = "is missing although its manifest lists it"
    elif (size := path.stat().st_size) != facts["bytes"]:
        fault = f"has {size} bytes, its manifest says {facts['bytes']}"
    elif check == "sha256" and hash_file(path) != facts["sha256"]:
        fault = "does not match its sha256"
    else:
        return
    with suppress(OSError):  # so that the next command looks at the file, whatever its times say
        path.with_name(SEALED).unlink()
    raise PipelineError(f"{path} {fault}; {REMEDY}")


@contextmanager
def lock_folder(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock inside the context: one driver at a time. The kernel frees it when the driver dies.

    Raises PipelineError if another holds it, or waits for that one to finish.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise PipelineError(
                f"{path} is being worked on by another command ({holder}); wait for it, or stop it"
            ) from None
        except OSError as error:
            raise PipelineError(
                f"{path / '.lock'} cannot be locked ({error.strerror}), so two commands could work on one run: mount "
                "the file system with locks (Lustre: -o flock; NFS: lockd, or version 4), or set cluster.storage"
            ) from error
        with translate_write_errors(path / ".lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} of {name_user()}")
            file.flush()
        yield


def name_user() -> str:
    """Return user@host of this process, or of the person who submitted its job."""
    return os.environ.get(USER_VARIABLE) or f"{psutil.Process().username()}@{socket.gethostname()}"


def is_locked(path: Path) -> bool:
    with suppress(OSError), (path / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
