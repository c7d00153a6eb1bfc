"""What travels with a job: the two packages and the configurations, never data; and what may not be said there.

A command line names files of this machine. Configurations are taken along; every other path has to be one that
the cluster sees.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import ddpm
import pipeline
from pipeline import config
from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError

LIMIT = 4 * 2**20  # bytes; the code and its configurations are well below one million
GIVEN = "given"  # the folder of configurations that were named by a path
_NOT_CODE = shutil.ignore_patterns("__pycache__", ".*")


@dataclass(frozen=True)
class Luggage:
    """A folder that becomes the job's working folder, and the shell command that is run in it."""

    folder: Path
    entrypoint: str
    bytes: int


def check_places(relative: list[str], cluster: ClusterConfig) -> None:
    """Raise ConfigError for what would mean another place on the cluster, or be seen by everybody there.

    relative: overrides and keys with relative paths, as 'data.path=images'.
    """
    problems = [
        f"{item} is a relative path, which means another folder on the cluster: give an absolute one that it sees"
        for item in relative
    ]
    if not cluster.storage.startswith("/"):
        problems.append(
            f"cluster.storage={cluster.storage} is a relative path; a job's working folder is temporary: give "
            "an absolute path that all machines of the cluster share, as cluster.storage=/data/runs"
        )
    uri = urlsplit(cluster.tracking_uri or "")
    if uri.username or uri.password:
        problems.append(
            "cluster.tracking_uri holds a user or a password, and a job's command is shown to everybody: leave it "
            "out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster"
        )
    if uri.scheme == "sqlite" and not uri.path.startswith("//"):
        problems.append(
            f"cluster.tracking_uri={cluster.tracking_uri} is a relative path; an absolute one has four slashes"
        )
    if problems:
        raise ConfigError(problems)


@contextmanager
def packed(words: list[str], commit: str | None) -> Iterator[Luggage]:
    """A temporary folder laid out as the installed program is, and the command `words` to be run in it."""
    with tempfile.TemporaryDirectory(prefix="ddpm-submit-") as name:
        folder = Path(name)
        for package in (pipeline, ddpm):
            source = Path(str(package.__file__)).parent
            shutil.copytree(source, folder / source.name, ignore=_NOT_CODE)
        if commit:
            (folder / "pipeline" / "COMMIT").write_text(commit)
        _copy_configurations(folder)
        words = [_taken_along(word, folder) for word in words]
        entrypoint = shlex.join(["python", "-m", "pipeline", *words, "cluster.ray_address=auto"])
        # exec: the signal that stops a job reaches the program, not a shell around it
        yield Luggage(folder, f"exec {entrypoint}", _size(folder))


def _copy_configurations(folder: Path) -> None:
    """The program's conf/ goes inside the package, as when it is installed; the ./conf of this folder beside it.

    So a name is found there in the same file as here.
    """
    here, *installed = config.conf_folders()
    own = next(source for source in installed if source.is_dir())
    for source, target in ((here, folder / "conf"), (own, folder / "pipeline" / "conf")):
        for kind in ("", "cluster", "sweep"):
            for file in sorted((source / kind).glob("*.yaml")):
                (target / kind).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / kind / file.name)


def _taken_along(word: str, folder: Path) -> str:
    """A configuration that `word` names by a path is copied, with the bases beside it; the word for it there."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return word
    place = folder / GIVEN / str(len(list(folder.glob(f"{GIVEN}/*"))))
    place.mkdir(parents=True)
    for file in config.files(path):
        shutil.copy(file, place / file.name)
    return f"{option}{equals}{(place / path.name).relative_to(folder)}"


def _size(folder: Path) -> int:
    """Bytes of the luggage. Raises ConfigError where it is too much to be code."""
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if sum(sizes.values()) > LIMIT:
        largest = max(sizes, key=lambda file: sizes[file])
        raise ConfigError(
            f"the code and configurations have {sum(sizes.values()) / 2**20:.1f} MB, more than the "
            f"{LIMIT / 2**20:.0f} MB that travel with a job; the largest is {largest.relative_to(folder)} "
            f"({sizes[largest] / 2**20:.1f} MB): data belongs where the cluster sees it, not into conf/"
        )
    return sum(sizes.values())
