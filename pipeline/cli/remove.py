"""`ddpm rm`: delete runs or sample sets, after a question."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from typing_extensions import TypedDict

from pipeline.cli import arguments
from pipeline.config.checks import Tree
from pipeline.console import print_line
from pipeline.engine.find import find_run, prepare_storage_root
from pipeline.errors import ConfigError, PipelineError
from pipeline.scores.metrics import Results
from pipeline.store import run as store
from pipeline.store.files import delete_folder, is_locked, lock_folder, read_json, read_sealed
from pipeline.store.tars import ShardSetFacts


class LeaderboardFile(TypedDict):
    """The keys of a study's leaderboard that this module reads."""

    trials: list[Tree]


def remove_runs(options: Namespace) -> int:
    """Delete the runs that are named, those that failed, or sample sets (`ddpm rm`)."""
    root = prepare_storage_root(arguments.load_cluster(options))
    runs = [find_run(name, root) for name in arguments.list_non_cluster_arguments(options)]
    if not (runs or options.failed or options.samples):
        raise ConfigError("which runs? Name them, or say --failed or --samples")
    runs = list(dict.fromkeys(runs)) or store.find_runs(root)
    runs = [run for run in runs if not options.failed or store.find_state(run) == "failed"]
    if busy := [run.name for run in runs if is_locked(run)]:
        raise PipelineError(f"{', '.join(busy)}: a command works on it; wait for it, or stop it")
    chosen, kept = [], False
    for run in runs:
        for folder in [file.parent for file in store.find_sample_facts(run)] if options.samples else [run]:
            if not options.force and (user := next(_list_dependents(root, run, folder), "")):
                print_line(f"kept {folder}: {user} refers to it; --force deletes it anyway")
                kept = True
            else:
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                print_line(f"{folder}: {size / 1e6:,.1f} MB")
                chosen.append((run, folder))
    if chosen and not options.yes:
        print("delete for ever? [y/N] ", end="", flush=True)
        if not sys.stdin or sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise PipelineError("nothing was deleted; --yes answers the question")
    for run, folder in chosen:
        with lock_folder(run):
            delete_folder(folder.resolve())  # where a link leads, perhaps on a larger disk
            delete_folder(folder)
    print_line("deleted; data and MLflow are as they were" if chosen else "nothing to delete")
    return int(kept)


def _list_dependents(root: Path, run: Path, folder: Path) -> Iterator[str]:
    """List what uses a folder: of a run, the leaderboards that rank it; of a sample set, the scores made from it."""
    for file in store.find_leaderboards(root) if folder == run else ():
        if any(trial.get("run") == run.name for trial in read_json(file, LeaderboardFile)["trials"]):
            yield f"the leaderboard of {file.parent.name}"
    for file in (file for file in store.find_sample_manifests(run) if file.parent == folder):
        drawn = read_json(file, ShardSetFacts).get("protocol", {})
        for scores in store.find_scores(run):
            protocol = read_sealed(scores, Results)["protocol"]
            if all(protocol.get(key, value) == value for key, value in drawn.items()):
                yield f"score {scores.parent.name}"
