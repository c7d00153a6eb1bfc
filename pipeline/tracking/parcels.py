"""What a run directory holds for the tracking server, in parcels that are sent when their version changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from pipeline.config import Experiment
from pipeline.store import files as rundir
from pipeline.store import keys, selection
from pipeline.store.run import Place
from pipeline.tracking.session import Child, Session

# Of the run key's content, what would only lengthen the list in the UI; experiment.yaml has it all.
_NOT_SHOWN = {
    "diffusion.t_sampling",
    "model.norm_groups",
    "model.resample",
    "train.accumulate",
    "train.label_dropout",
    "train.deterministic",
}  # fmt: skip


@dataclass(frozen=True)
class Parcel:
    """A piece of the mirror. `version` changes with its content; `send` puts it onto the server."""

    name: str
    version: str
    send: Callable[[Session], None]


def _version(path: Path) -> str:
    """Cheap, and safe because every file but the log comes into being whole."""
    facts = path.stat()
    return f"{facts.st_size}-{facts.st_mtime_ns}"


def parcels(
    experiment: Experiment,
    run: Place,
    tags: dict[str, str],
    delivered: dict[str, str],
    child: Child | None = None,
) -> Iterator[Parcel]:
    """Everything that the run directory holds by now, in the order in which it is delivered."""
    labels = _tags(run) | tags
    parameters = _parameters(experiment, run) | (child.parameters if child else {})
    describe = partial(Session.send_description, parameters=parameters, tags=labels)
    yield Parcel("description", keys.hash_of([parameters, labels]), describe)
    if (run.data / rundir.MANIFEST).exists():
        yield Parcel("dataset", run.data_key, Session.send_dataset)
    start = int(delivered.get("log", 0))
    end = _end_of_log(run.log, start)
    if end:
        yield Parcel("log", str(end), partial(Session.send_log, start=start if start <= end else 0, end=end))
    for grid in sorted(run.grids.glob("[0-9]*.png")):
        yield Parcel(f"grid {grid.stem}", "1", partial(Session.send_grid, grid=grid))
    steps = sorted(int(meta.parent.name[5:]) for meta in run.train.glob("step_*/meta.json"))
    if steps:
        yield Parcel("checkpoints", str(steps), partial(Session.send_checkpoints, steps=steps))
    found = selection.resolve(run.of(experiment))
    resolved = found.experiment if found else None
    yield from _evaluations(experiment, resolved, run, alone=child is not None)
    for folder, file in _artifacts(resolved, run):
        send = partial(Session.send_file, file=file, folder=folder)
        yield Parcel(f"artifact {folder}/{file.name}", _version(file), send)


def _evaluations(
    experiment: Experiment, resolved: Experiment | None, run: Place, alone: bool
) -> Iterator[Parcel]:
    """One evaluation is the headline; those of candidates are points of a curve; the others stand beside it,
    unless it is to be `alone`: the rungs of a sweep would be rows beside its trials."""
    found = sorted(run.path.glob("evaluation/[0-9a-f]*/metrics.json"))
    headline = resolved and run.of(resolved).scores
    # Looked up after the scores, which come after their checkpoint: so no candidate is taken for another.
    chooses = bool(experiment.evaluate.checkpoints)
    scored = selection.list_candidates(run.of(experiment)) if chooses else {}
    candidates = {place.scores: step for step, place in scored.items()}
    for scores in found:
        key, version = scores.parent.name, _version(scores)
        if scores.parent in candidates:
            send = partial(Session.send_candidate, step=candidates[scores.parent], scores=scores)
            yield Parcel(f"candidate {key}", version, send)
        if scores.parent == headline:
            yield Parcel(f"scores {key}", version, partial(Session.send_scores, scores=scores))
        elif scores.parent not in candidates and not alone:
            yield Parcel(f"evaluation {key}", version, partial(Session.send_evaluation, scores=scores))
    if chooses and (choice := run.of(experiment).selection_json).exists():
        send = partial(Session.send_choice, file=choice)
        yield Parcel(f"selection {choice.parent.name}", _version(choice), send)


def _artifacts(experiment: Experiment | None, run: Place) -> Iterator[tuple[str, Path]]:
    """(folder on the server, file): the configuration, and what belongs to the headline evaluation, once it is
    known which one that is."""
    if run.experiment_yaml.is_file():
        yield "", run.experiment_yaml
    if experiment is None:
        return
    evaluation = run.of(experiment).scores
    figures = run.of(experiment).figures
    wanted = {
        "samples": [run.of(experiment).samples_grid],
        "evaluation": [evaluation / "metrics.json", evaluation / "nll.json"],
        "figures": sorted(figures.glob("*.png")) + sorted(figures.glob("*.svg")),
        "report": [file for file in sorted(run.report.glob("*")) if file.name != rundir.MANIFEST],
    }
    for folder, files in wanted.items():
        yield from ((folder, file) for file in files if file.is_file())


def _end_of_log(path: Path, start: int) -> int:
    """Bytes up to the end of the last whole line."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        if start > file.seek(0, os.SEEK_END):
            start = 0
        file.seek(start)
        return start + file.read().rfind(b"\n") + 1


def _tags(run: Place) -> dict[str, str]:
    """What experiment.yaml says of where the run was made, and the keys."""
    tree = yaml.safe_load(run.experiment_yaml.read_text()) if run.experiment_yaml.exists() else {}
    made = tree.get("made_with") or {}
    tags = {"run_key": run.run_key, "data_key": run.data_key}
    if made.get("commit"):
        tags |= {"commit": made["commit"], "mlflow.source.git.commit": made["commit"]}
    tags |= {f"commit.{stage}": ", ".join(commits) for stage, commits in run.commits_by_stage().items()}
    return tags | {f"version.{name}": str(version) for name, version in (made.get("versions") or {}).items()}


def _parameters(experiment: Experiment, run: Place) -> dict[str, str]:
    """About 25, all determined by the run key, because MLflow lets no parameter change."""
    content = keys.run_content(experiment, whole=True)
    shown = {
        "seed": str(content.pop("seed")),
        "data.source": run.experiment.data.source,
        "data.image_size": str(experiment.data.image_size),
    }
    for section, values in content.items():
        named = {f"{section}.{key}": str(value) for key, value in values.items()}
        shown |= {key: value for key, value in named.items() if key not in _NOT_SHOWN}
    if (run.data / rundir.MANIFEST).exists():
        splits = rundir.read_json(run.data / rundir.MANIFEST)["splits"]
        shown |= {f"data.{name}_images": str(split["count"]) for name, split in splits.items()}
    return shown
