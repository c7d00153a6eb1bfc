"""Finished work to and from an object store that speaks S3: `ddpm push`, `ddpm pull`.

A prefix of the store mirrors a storage root: s3://BUCKET/PREFIX/<run>/... and s3://BUCKET/PREFIX/data/<shards>/...
What travels is finished: folders that a manifest or a checkpoint's meta file seals, and the run's own record. Every
object carries its sha256, `contents.json` is written last and lists them all, and what is there and equal stays. The
store stays closed to whoever has no credentials: they come from the environment (AWS_ACCESS_KEY_ID, ...,
AWS_ENDPOINT_URL) and are never asked for, shown or written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.console import bar
from pipeline.errors import PipelineError
from pipeline.store.run import (
    MANIFEST,
    TEMPORARY,
    atomic_file,
    check_file,
    exclusive,
    file_facts,
    read_json,
    sha256_of,
)

SEALS = (MANIFEST, "meta.json")
RECORD = ("experiment.yaml", "log.jsonl", "timings.json", "commits.json", "grids/*.png")
CONTENTS = "contents.json"
Facts = dict[str, dict[str, Any]]


def push(name: str, root: Path, uri: str) -> str:
    """Bring what is finished of a run (or of data/<shards>) to the prefix `uri`; returns what was done, in a line.

    Raises PipelineError where a file is not what its manifest says, or the store does not take it.
    """
    path = _local(name, root)
    item = f"data/{path.name}" if path.parent.name == "data" else path.name
    store = Store.at(f"{uri.rstrip('/')}/{item}")
    with exclusive(path):
        facts = _finished(path)
        if not facts:
            raise PipelineError(f"{path} holds nothing that is finished")
        sent = 0
        with bar("push", len(facts), "files") as shown:
            for done, (file, fact) in enumerate(facts.items(), 1):
                sent += store.put(path / file, file, fact)
                shown.update(done)
        store.write(CONTENTS, {"files": {**store.contents(), **facts}})
    return f"{store.uri}: {sent} files sent, {len(facts) - sent} were there"


def pull(uri: str, root: Path) -> str:
    """Bring what `push` left at `uri` (a prefix and the name of a run, or data/<shards>) into the storage root.

    What this root has finished itself is kept. Raises PipelineError where nothing was pushed, or an object is not
    what the list of contents says.
    """
    store = Store.at(uri)
    contents = store.contents()
    if not contents:
        known = ", ".join(store.items()) or "none"
        raise PipelineError(f"{store.uri} is nothing that was pushed; below it there are: {known}")
    name = Path(store.prefix).name
    target = root / "data" / name if Path(store.prefix).parent.name == "data" else root / name
    folders: dict[str, list[str]] = {}
    for file in contents:
        folders.setdefault(str(Path(file).parent), []).append(file)
    fetched = 0
    kept: list[str] = []
    with exclusive(target), bar("pull", len(contents), "files") as shown:
        done = 0
        for folder, files in folders.items():
            facts = {file: contents[file] for file in sorted(files, key=_seals_last)}
            if any(Path(file).name in SEALS for file in files):
                fetched += _fetch_folder(store, target, folder, facts, kept)
            else:
                fetched += sum(
                    _fetch_record(store, target / file, file, fact) for file, fact in facts.items()
                )
            done += len(files)
            shown.update(done)
    note = f"; kept as they are here: {', '.join(kept)}" if kept else ""
    return f"{target}: {fetched} files fetched, {len(contents) - fetched} were there{note}"


# Which files


def _local(name: str, root: Path) -> Path:
    """The folder that `name` (a path, or a name in the storage root) means."""
    for path in (Path(name).absolute(), root / name):
        if (path / "experiment.yaml").is_file() or (path / MANIFEST).is_file():
            return path
    raise PipelineError(f"'{name}' is neither a run nor finished shards (data/NAME), here or in {root}")


def _finished(path: Path) -> Facts:
    """Bytes and sha256 of everything below `path` that is finished, by name relative to it, seals after what they
    seal. Raises PipelineError where a sealed folder is not what its seal says."""
    files = [file for pattern in RECORD for file in sorted(path.glob(pattern))]
    for seal in sorted(file for name in SEALS for file in path.rglob(name)):
        folder = seal.parent
        if any(part.startswith(TEMPORARY) for part in seal.relative_to(path).parts):
            continue
        for name, facts in read_json(seal)["files"].items():
            check_file(folder / name, facts)
        inside = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name[0] != "."]
        files += [file for file in inside if file != seal] + [seal]
    return {str(file.relative_to(path)): file_facts(file) for file in files}


def _seals_last(file: str) -> tuple[bool, str]:
    return Path(file).name in SEALS, file


def _is(path: Path, facts: dict[str, Any]) -> bool:
    """Whether `path` is the file that `facts` describes."""
    return path.is_file() and path.stat().st_size == facts["bytes"] and sha256_of(path) == facts["sha256"]


def _fetch_folder(store: Store, target: Path, folder: str, facts: Facts, kept: list[str]) -> int:
    """A sealed folder appears whole; one that is sealed here stays, and is noted in `kept` where it differs."""
    final = target / folder
    if any((final / seal).exists() for seal in SEALS):
        if not all(_is(target / file, fact) for file, fact in facts.items()):
            kept.append(folder)
        return 0
    in_place = final == target  # the item itself, which holds the lock: its seal comes last
    staged = final if in_place else final.with_name(f"{TEMPORARY}pull-{final.name}")
    missing = {file: fact for file, fact in facts.items() if not _is(staged / Path(file).name, fact)}
    for file, fact in missing.items():
        store.get(file, staged / Path(file).name, fact)
    if not in_place:
        shutil.rmtree(final, ignore_errors=True)  # without a seal it was nobody's
        staged.rename(final)
    return len(missing)


def _fetch_record(store: Store, path: Path, file: str, facts: dict[str, Any]) -> int:
    """A file of the run's record is fetched where there is none, and the log where the other one is longer."""
    shorter_log = path.name == "log.jsonl" and path.exists() and path.stat().st_size < facts["bytes"]
    if path.exists() and not shorter_log:
        return 0
    store.get(file, path, facts)
    return 1


# The store


@dataclass(frozen=True)
class Store:
    """Objects below one prefix of one bucket. The only importer of boto3."""

    client: Any
    bucket: str
    prefix: str

    @classmethod
    def at(cls, uri: str) -> Store:
        parts = urlsplit(uri)
        if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc:
            raise PipelineError(f"'{uri}' names no place in a store; write s3://BUCKET/PREFIX")
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise PipelineError("boto3 is missing: pip install 'ddpm-pipeline[cluster]'") from error
        # Our own sha256 is what counts, and not every server knows the checksums that boto3 would add.
        plain = Config(
            request_checksum_calculation="when_required", response_checksum_validation="when_required"
        )
        with _explained(uri):
            return cls(boto3.client("s3", config=plain), parts.netloc, parts.path.strip("/"))

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def put(self, path: Path, name: str, facts: dict[str, Any]) -> bool:
        """Upload unless an equal object is there; whether it was not."""
        from botocore.exceptions import ClientError

        with _explained(self.uri):
            try:
                there = self.client.head_object(Bucket=self.bucket, Key=self._key(name))
                if (there["ContentLength"], there["Metadata"].get("sha256")) == (
                    facts["bytes"],
                    facts["sha256"],
                ):
                    return False
            except ClientError as error:
                # 403 says no more than 404 to whoever may not list: the upload will tell.
                if error.response["Error"]["Code"] not in ("403", "404"):
                    raise
            carried = {"Metadata": {"sha256": facts["sha256"]}}
            self.client.upload_file(str(path), self.bucket, self._key(name), ExtraArgs=carried)
        return True

    def get(self, name: str, path: Path, facts: dict[str, Any]) -> None:
        """Download to `path`, which appears whole and with the right hash or not at all."""
        with atomic_file(path) as temporary:
            with _explained(f"{self.uri}/{name}"):
                self.client.download_file(self.bucket, self._key(name), str(temporary))
            if not _is(temporary, facts):
                raise PipelineError(
                    f"{self.uri}/{name} is not what {CONTENTS} says: it was damaged, or is being pushed just now; "
                    "push it again"
                )

    def write(self, name: str, content: Any) -> None:
        with _explained(self.uri):
            body = json.dumps(content, indent=1, sort_keys=True).encode()
            self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=body)

    def contents(self) -> Facts:
        """What was pushed here; nothing where nothing was."""
        from botocore.exceptions import ClientError

        with _explained(self.uri):
            try:
                body = self.client.get_object(Bucket=self.bucket, Key=self._key(CONTENTS))["Body"].read()
            except ClientError as error:
                if error.response["Error"]["Code"] == "NoSuchKey":
                    return {}
                raise
        files = json.loads(body)["files"]
        if stray := [file for file in files if file.startswith("/") or ".." in Path(file).parts]:
            raise PipelineError(f"{self.uri}/{CONTENTS} lists '{stray[0]}', which lies outside")
        return files

    def items(self) -> Iterator[str]:
        """The URIs below this prefix that can be pulled."""
        with _explained(self.uri):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    if entry["Key"].endswith(f"/{CONTENTS}"):
                        yield f"s3://{self.bucket}/{entry['Key'].removesuffix(f'/{CONTENTS}')}"


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """The errors of the store in a user's words."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError as error:
        raise PipelineError(
            f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        ) from error
    except (ClientError, BotoCoreError, Boto3Error) as error:
        raise PipelineError(f"{where}: {error}") from error
