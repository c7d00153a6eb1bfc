"""What a set of files holds, and how to tell cheaply that it has not changed."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.store.files import sha256_of


def digest_of(files: list[Path], root: Path) -> str:
    """sha256 over the content of the files and their names below `root`."""
    with _named():
        lines = [f"{file.relative_to(root).as_posix()} {sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def stamp_of(files: list[Path]) -> str:
    """sha256 over the paths, sizes and modification times: opens none of the files."""
    with _named():
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PipelineError(
            f"{error.filename} cannot be read ({error.strerror}); restore or remove it"
        ) from error
