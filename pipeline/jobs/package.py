"""The folder that is uploaded with a job: both packages and the configurations, no data."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline import config
from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, hide_password

LIMIT = 4 * 2**20  # bytes; the code and its configurations are well below one million
CODE = Path(__file__).parents[2]  # the folder that holds the two packages
GIVEN = "given"  # the folder for configurations that are named by a path


@dataclass(frozen=True)
class Package:
    """A folder that becomes the job's working folder, and the shell command that is run in it."""

    folder: Path
    entrypoint: str
    bytes: int


def check_paths(relative: list[str], cluster: ClusterConfig) -> None:
    """Raise ConfigError for relative paths (as 'data.path=images') and for passwords, which others could read there."""
    means = "is a relative path, which means another folder on the cluster"
    uri = urlsplit(cluster.tracking_uri or "")
    remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster"
    problems = [f"{item} {means}: give an absolute one that it sees" for item in relative]
    if not cluster.storage.startswith("/"):
        remedy_here = "give one that all machines share, as /data/runs"
        problems.append(f"cluster.storage={cluster.storage} {means}: {remedy_here}")
    if cluster.tracking_uri and hide_password(cluster.tracking_uri) != cluster.tracking_uri:
        problems.append(f"cluster.tracking_uri holds a user, password or query that all could read: {remedy}")
    if uri.scheme == "sqlite" and not uri.path.startswith("//"):
        given = f"cluster.tracking_uri={hide_password(uri.geturl())}"
        problems.append(f"{given} is a relative path; an absolute one has four slashes")
    if problems:
        raise ConfigError(problems)


@contextmanager
def create_package(words: list[str], commit: str | None) -> Iterator[Package]:
    """Create a temporary folder with the program, its conf/ and this folder's; `words` is the command in it."""
    with tempfile.TemporaryDirectory(prefix="ddpm-submit-") as name:
        folder = Path(name)
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for package in ("pipeline", "ddpm"):
            shutil.copytree(CODE / package, folder / package, ignore=ignored)
        if commit:
            (folder / "pipeline" / "COMMIT").write_text(commit)
        here, *installed = config.list_conf_folders()
        shipped = next(source for source in installed if source.is_dir())
        for source, target in ((here, folder / "conf"), (shipped, folder / "pipeline" / "conf")):
            for kind in config.FOLDERS:
                (target / kind).mkdir(parents=True, exist_ok=True)
                for file in (source / kind).glob("*.yaml"):
                    shutil.copy(file, target / kind)
        words = [_copy_configuration(word, folder) for word in words]
        entrypoint = shlex.join(["python", "-m", "pipeline", *words, "cluster.ray_address=auto"])
        # exec: the signal that stops a job reaches the program, not a shell around it
        yield Package(folder, f"exec {entrypoint}", _check_size(folder))


def _copy_configuration(word: str, folder: Path) -> str:
    """Copy the configuration file that an argument names, with its bases; return the argument for the cluster."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return word
    place = folder / GIVEN / str(len(list(folder.glob(f"{GIVEN}/*"))))
    place.mkdir(parents=True)
    for file in config.list_base_files(path):
        shutil.copy(file, place / file.name)
    return f"{option}{equals}{(place / path.name).relative_to(folder)}"


def _check_size(folder: Path) -> int:
    """Return the package's size in bytes. Raises ConfigError if it is too large."""
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    total, largest = sum(sizes.values()), max(sizes, key=lambda file: sizes[file])
    if total > LIMIT:
        found = f"{largest.relative_to(folder)} has {sizes[largest] / 2**20:.1f} MB"
        most = f"only {LIMIT / 2**20:.0f} MB of code and configurations travel with a job"
        raise ConfigError(f"{found}, and {most}: put data where the cluster sees it, not into conf/")
    return total
