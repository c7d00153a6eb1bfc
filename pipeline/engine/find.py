"""Finds runs: by experiment, by name, and those of an earlier version."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import config
from pipeline.config import ClusterConfig, Experiment
from pipeline.errors import ConfigError, PipelineError
from pipeline.store import keys
from pipeline.store.files import TEMPORARY, UMASK, is_locked, lock_folder, write_text
from pipeline.store.run import EXPERIMENT, Place, find_last_change, find_runs, locate_fingerprints

CLOCK_SECONDS = 10  # the clocks of a file server and its client may differ by this


def prepare_storage_root(cluster: ClusterConfig) -> Path:
    """Create the storage root if needed and return its absolute path. Raises PipelineError if it is not writable."""
    root = cluster.storage_root
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        problem = f"the storage root {root} cannot be written ({error.strerror})"
        raise PipelineError(f"{problem}; set cluster.storage") from error
    return root


def find_storage_problems(root: Path) -> str:
    """Return which operations fail on the file system of a storage root; empty if all work."""
    began = time.time()
    try:
        with _make_probe(root) as folder:
            file = folder / "file"
            write_text(file, "1")
            write_text(file, "2")  # written, flushed to the disk, renamed over the other
            if file.read_text() != "2":
                return "a renamed file does not replace the one of that name"
            if abs(file.stat().st_mtime - began) > CLOCK_SECONDS:
                return "its clock differs from this machine's, and file times are compared: set both by one time server"
            with lock_folder(folder):
                if not is_locked(folder):
                    return "a held lock does not stop a second process: mount it with locks"
    except (OSError, PipelineError) as error:
        return str(error)
    return ""


def find_machine_problems(root: Path, address: str) -> dict[str, str]:
    """Return what is wrong with the storage root as each machine of the cluster at `address` sees it, or ''."""
    from pipeline.compute.session import call_on_machines

    with _make_probe(root) as folder, lock_folder(folder):
        return call_on_machines(address, _check_folder, folder)


@contextmanager
def _make_probe(root: Path) -> Iterator[Path]:
    prefix = f"{TEMPORARY}doctor-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root, ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o777 & ~UMASK)  # the machines of a cluster may run as another user
        yield Path(name)


def _check_folder(folder: Path) -> str:
    """Return what is wrong with a folder that another machine has just made and locked, as this one sees it."""
    if not folder.is_dir():
        return "sees another folder there: mount the same file system at this path on all machines"
    return "" if is_locked(folder) else "does not see who holds a lock: mount it with locks for all machines"


def make_place(experiment: Experiment, root: Path, remember: bool = True) -> Place:
    """Make the place of an experiment, with its keys. Raises ConfigError if a file of the experiment is missing."""
    if missing := experiment.find_missing_files():
        raise ConfigError(missing)
    from pipeline.data import sources  # they import their libraries

    fingerprint = sources.compute_fingerprint(experiment.data, locate_fingerprints(root), remember)
    data_key = keys.make_data_key(experiment, fingerprint)
    return Place(root, experiment, data_key, keys.make_run_key(experiment, data_key))


def read_place(path: Path) -> Place:
    """Read the place of a run directory from its experiment.yaml; its data may be elsewhere."""
    file = path / EXPERIMENT
    try:
        if explanation := explain_first_version(path):
            raise PipelineError(explanation)
        experiment = config.load_experiment(str(file), [])
        data_key = str(config.read_provenance(file)["data_key"])
    except (PipelineError, KeyError, TypeError) as error:
        raise PipelineError(f"{file} cannot be read: {error}") from error
    if missing := experiment.find_missing_files():
        raise ConfigError(missing)
    place = Place(path.parent, experiment, data_key, keys.make_run_key(experiment, data_key))
    if place.name != path.name:
        raise PipelineError(
            f"{path.name} was renamed, or made before a formula was corrected: its settings give {place.name} now; the "
            "program of the commit that its experiment.yaml names can read it"
        )
    return place


def explain_first_version(path: Path) -> str | None:
    """Return how to read a run directory of the program's first version; None for other runs."""
    provenance = config.read_provenance(path / EXPERIMENT)
    if provenance.get("keys") == str(keys.VERSION):
        return None
    commit = str(provenance.get("commit") or "ef6030f").rstrip("+")
    return (
        f"{path.name} was made by the first version of this program, under other keys; to read it: "
        f"git worktree add first-version {commit} && cd first-version && make run"
    )


def explain_unreadable_runs(place: Place) -> list[str]:
    """Explain why the newest runs with this experiment's name cannot be read, if they cannot: one line for each."""
    named = find_runs(place.storage, f"{place.experiment.name}-")
    alike = [path for path in named if len(path.name) == len(place.name)]
    lines = []
    for path in sorted(alike, key=find_last_change)[-3:]:
        try:
            read_place(path)
        except PipelineError as error:
            lines.append(str(error))
    return lines


def find_run(name: str, root: Path) -> Path:
    """Return the absolute path of the one run that `name` means (see `find_named_runs`)."""
    found = find_named_runs(name, root)
    if len(found) > 1:
        several = ", ".join(path.name for path in found)
        raise PipelineError(f"'{name}' is the start of several names: {several}; write more of it")
    return found[0]


def find_named_runs(name: str, root: Path) -> list[Path]:
    """Return every run that `name` means: a path, a name in the storage root, or the start of several names there."""
    paths = [path for path in (Path(name).absolute(), root / name) if (path / EXPERIMENT).is_file()]
    if found := paths[:1] or find_runs(root, name):
        return found
    known = ", ".join(path.name for path in find_runs(root)) or "none"
    raise PipelineError(f"'{name}' is no run directory; runs in {root}: {known}")
