"""Copies finished results to and from an object store: `ddpm push`, `ddpm pull`.

A prefix of the store mirrors a storage root: URI/<run>/... and URI/data/<shards>/... Only finished files are copied:
folders with a seal (a manifest or a checkpoint's meta file), and the run's own record. `contents.json`, written last,
lists every file with its bytes and sha256. Any store of pyarrow is possible. Addresses and credentials come from the
environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...); the program never asks for them, shows them or writes them.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from pyarrow import ArrowException, fs

from pipeline.console import show_progress
from pipeline.errors import PipelineError, hide_password
from pipeline.store.files import (
    MANIFEST,
    TEMPORARY,
    FileFacts,
    Manifest,
    hash_file,
    lock_folder,
    parse_json,
    read_file_facts,
    read_json,
    require_file,
    write_atomically,
)
from pipeline.store.run import EXPERIMENT, LOG, RECORD

SEALS = (MANIFEST, "meta.json")
CONTENTS = "contents.json"
BLOCK = 8 << 20  # bytes that are copied at a time
LIMIT = 120.0  # seconds for one answer of a store, or for one block
# What sets credentials in the environment, and how stores and their clients say that there are none.
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "ab": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
}
DENIALS = ("access_denied", "401", "403", "invalid_access_key_id", "access token", "credential")
T = TypeVar("T")


def push_run(name: str, root: Path, uri: str) -> str:
    """Copy the finished files of a run (or of data/<shards>) to the prefix `uri`; return a summary."""
    places = (Path(name).absolute(), root / name)
    path = next((p for p in places if (p / EXPERIMENT).is_file() or (p / MANIFEST).is_file()), None)
    if path is None:
        raise PipelineError(f"'{name}' is neither a run nor finished shards (data/NAME), here or in {root}")
    item = f"data/{path.name}" if path.parent.name == "data" else path.name
    prefix, mark, query = uri.partition("?")
    store = ObjectStore(f"{prefix.rstrip('/')}/{item}{mark}{query}")
    with lock_folder(path):
        files = _list_finished_files(path)
        if not files:
            raise PipelineError(f"{path} holds nothing that is finished")
        sent = 0
        with show_progress("push", len(files), "files") as progress:
            for done, (file, facts) in enumerate(files.items(), 1):
                sent += store.upload(path / file, file, facts)
                progress.update(done)
        store.write_file_list(files)
    return f"{store.uri}: {sent} files sent, {len(files) - sent} were there"


def pull_run(uri: str, root: Path) -> str:
    """Copy a pushed run (or data/<shards>) from `uri` into the storage root; return a summary.

    Files that this root has finished itself are kept. Raises PipelineError if nothing was pushed, or an object is not
    what the list of contents says.
    """
    store = ObjectStore(uri)
    if not store.contents:
        items = [name.removesuffix(f"/{CONTENTS}") for name in store.objects if name.endswith(f"/{CONTENTS}")]
        known = ", ".join(f"{store.uri}/{item}" for item in items) or "none"
        raise PipelineError(f"{store.uri} holds nothing that was pushed; below it there are: {known}")
    place = Path(store.uri)
    target = root / "data" / place.name if place.parent.name == "data" else root / place.name
    folders: dict[str, list[str]] = {}
    for file in sorted(store.contents, key=_is_seal):  # seals come last
        folders.setdefault(str(Path(file).parent), []).append(file)
    fetched, kept = 0, []
    with lock_folder(target), show_progress("pull", len(folders), "folders") as progress:
        for done, (folder, files) in enumerate(folders.items(), 1):
            if not any((target / folder / seal).exists() for seal in SEALS):
                fetched += _download_folder(store, target, folder, files)
            elif not all(_has_same_content(target / file, store.contents[file]) for file in files):
                kept.append(folder)
            progress.update(done)
    note = f"; kept as they are here: {', '.join(kept)}" if kept else ""
    return f"{target}: {fetched} files fetched, {len(store.contents) - fetched} were there{note}"


def _list_finished_files(path: Path) -> dict[str, FileFacts]:
    """Return the finished files below `path` by relative name, seals last; all are compared with their seals."""
    files = [file for pattern in RECORD for file in sorted(path.glob(pattern))]
    known: dict[Path, FileFacts] = {}  # of files that were just compared, which are large
    for seal in sorted(file for name in SEALS for file in path.rglob(name)):
        if any(part.startswith(TEMPORARY) for part in seal.relative_to(path).parts):
            continue
        for name, facts in read_json(seal, Manifest)["files"].items():
            require_file(seal.parent / name, facts)
            known[seal.parent / name] = {"bytes": facts["bytes"], "sha256": facts["sha256"]}
        inside = [file for file in sorted(seal.parent.iterdir()) if file.is_file() and file.name[0] != "."]
        files += [file for file in inside if file != seal] + [seal]
    return {str(file.relative_to(path)): known.get(file) or read_file_facts(file) for file in files}


def _is_seal(file: str) -> bool:
    return Path(file).name in SEALS


def _has_same_content(path: Path, facts: FileFacts) -> bool:
    return path.is_file() and path.stat().st_size == facts["bytes"] and hash_file(path) == facts["sha256"]


def _download_folder(store: ObjectStore, target: Path, folder: str, files: list[str]) -> int:
    """Fetch a folder, or the rest of it after a broken pull; return the number of new files.

    Of files without a seal, those that are missing, and the log if the pushed one is longer.
    """
    final = staged = target / folder
    if not any(map(_is_seal, files)):
        log = target / LOG
        is_longer = log.exists() and log.stat().st_size < store.contents.get(LOG, {"bytes": 0})["bytes"]
        files = [f for f in files if not (target / f).exists() or (f == LOG and is_longer)]
    elif final != target:  # the item itself holds the lock and stays in its place; its seal comes last
        staged = final.with_name(f"{TEMPORARY}pull-{final.name}")
    fetched = sum(store.download(file, staged / Path(file).name) for file in files)
    if staged != final:
        shutil.rmtree(final, ignore_errors=True)  # without a seal it was unfinished
        staged.rename(final)
    return fetched


class ObjectStore:
    """Objects below the prefix `uri`; listed once."""

    def __init__(self, uri: str):
        self.uri = uri.rstrip("/")
        parts = urlsplit(uri)
        shown = hide_password(uri)
        nowhere = PipelineError(
            f"'{shown}' is no store address; write s3://BUCKET/PREFIX, gs://, abfss:// or file:///FOLDER"
        )
        if parts.password is not None or not (parts.netloc or parts.scheme == "file"):
            raise nowhere
        if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
            uri += f"{'&' if parts.query else '?'}retry_limit_seconds=15"  # else for 15 minutes
        try:
            system, path = _ask(uri, fs.FileSystem.from_uri, uri)
        except PipelineError as error:
            raise nowhere if isinstance(error.__cause__, ValueError) else error from error.__cause__
        self.system = fs.SubTreeFileSystem(path, system)

    @cached_property
    def objects(self) -> dict[str, fs.FileInfo]:
        everything = fs.FileSelector("", allow_not_found=True, recursive=True)
        found = _ask(self.uri, self.system.get_file_info, everything)
        return {info.path: info for info in found if info.is_file}

    @cached_property
    def contents(self) -> dict[str, FileFacts]:
        if CONTENTS not in self.objects:
            return {}
        text = b"".join(self._read_object(CONTENTS))
        files = parse_json(text, Manifest, f"{self.uri}/{CONTENTS}", "push it again")["files"]
        if stray := [file for file in files if file.startswith("/") or ".." in Path(file).parts]:
            raise PipelineError(f"{self.uri}/{CONTENTS} lists '{stray[0]}', which lies outside")
        return files

    def upload(self, path: Path, name: str, facts: FileFacts) -> bool:
        """Upload a file unless an equal object exists; return whether it was uploaded.

        An object that `contents.json` lists is not read to compare it.
        """
        info = self.objects.get(name)
        if info and info.size == facts["bytes"]:
            if self.contents.get(name) == facts and info.mtime <= self.objects[CONTENTS].mtime:
                return False
            digest = hashlib.sha256()
            for block in self._read_object(name):
                digest.update(block)
            if digest.hexdigest() == facts["sha256"]:
                return False
        with path.open("rb") as file:
            self._write_object(name, file)
        return True

    def write_file_list(self, files: dict[str, FileFacts]) -> None:
        text = json.dumps({"files": {**self.contents, **files}}, indent=1, sort_keys=True)
        self._write_object(CONTENTS, io.BytesIO(text.encode()))

    def download(self, name: str, path: Path) -> bool:
        """Download an object atomically and verify its hash; return whether it was downloaded."""
        if _has_same_content(path, self.contents[name]):
            return False
        with write_atomically(path) as temporary:
            with temporary.open("wb") as file:
                file.writelines(self._read_object(name))
            if not _has_same_content(temporary, self.contents[name]):
                raise PipelineError(
                    f"{self.uri}/{name} is not what {CONTENTS} says: it was damaged, or is being pushed just now; "
                    "push it again"
                )
        return True

    def _write_object(self, name: str, file: BinaryIO) -> None:
        if self.system.base_fs.type_name == "local":  # object stores need no folders
            _ask(self.uri, self.system.create_dir, str(Path(name).parent))
        stream = _ask(self.uri, self.system.open_output_stream, name)
        while block := file.read(BLOCK):
            _ask(self.uri, stream.write, block)
        _ask(self.uri, stream.close)

    def _read_object(self, name: str) -> Iterator[bytes]:
        stream = _ask(where := f"{self.uri}/{name}", self.system.open_input_stream, name)
        while block := _ask(where, stream.read, BLOCK):
            yield block


def _ask(uri: str, call: Callable[..., T], *arguments: object) -> T:
    """Return what a call of a store's client returns. A thread calls it, since some libraries wait for ever.

    Raises PipelineError.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call(*arguments))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    where = hide_password(uri)
    try:
        return answer.result(LIMIT)
    except (OSError, ArrowException) as error:
        if not answer.done():
            atexit.register(os._exit, 1)  # the end of the client for S3 would wait for that call
            raise PipelineError(
                f"{where} does not answer within {LIMIT:.0f} s; is the address right?"
            ) from error
        reason = " ".join(str(error).split())
        denied = any(sign in reason.lower() for sign in DENIALS)
        remedy = (
            f"; set {CREDENTIALS[uri[:2]]} in the environment" if denied and uri[:2] in CREDENTIALS else ""
        )
        raise PipelineError(f"{where}: {reason[:300]}{remedy}") from error
