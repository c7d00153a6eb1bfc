"""The files of a run directory in parcels, which are sent to the tracking server when their version changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline import config
from pipeline.config.checks import Tree
from pipeline.config.neutral import UNHASHED
from pipeline.store import keys, selection
from pipeline.store.checkpoint import describe_model, read_meta
from pipeline.store.files import MANIFEST, SEALED, PageManifest, read_json, read_manifest, try_read
from pipeline.store.log import find_last_line_end
from pipeline.store.run import Place, find_scores, list_steps
from pipeline.store.tars import ShardSetFacts
from pipeline.tracking import models
from pipeline.tracking.run_sender import ChildRun, RunSender

LOG_BYTES = 2**20  # of the log in a parcel: some 3,500 lines


@dataclass(frozen=True)
class Parcel:
    """A part of a run that is sent to MLflow, again whenever its `version` changes."""

    name: str
    version: str
    send: Callable[[RunSender], object]


def _make_parcel(name: str, file: Path, send: Callable[..., None], **arguments: int | str) -> Parcel:
    """Make the parcel of a file. Size and time are its version: every file but the log is written once, whole."""
    facts = file.stat()
    return Parcel(name, f"{facts.st_size}-{facts.st_mtime_ns}", partial(send, file=file, **arguments))


def list_parcels(
    place: Place, tags: dict[str, str], delivered: dict[str, str], child: ChildRun | None = None,
    largest_model: float = 0,
) -> Iterator[Parcel]:  # fmt: skip
    """Yield the parcels of a run directory, in the order in which they are sent.

    delivered: versions by name; largest_model: bytes of the largest weights that are sent.
    """
    parameters = _list_parameters(place) | (child.parameters if child else {})
    labels = _make_tags(place, parameters) | tags
    describe = partial(RunSender.send_parameters_and_tags, parameters=parameters, tags=labels)
    yield Parcel("description", keys.hash_content([parameters, labels]), describe)
    if (place.data / MANIFEST).exists():
        yield Parcel("dataset", place.data_key, RunSender.send_dataset)
    start = int(delivered.get("log", 0))
    while (end := find_last_line_end(place.log, start, LOG_BYTES)) not in (0, start):
        yield Parcel("log", str(end), partial(RunSender.send_log, start=start if start < end else 0, end=end))
        start = end
    for grid in sorted(place.grids.glob("[0-9]*.png")):
        yield Parcel(f"grid {grid.stem}", "1", partial(RunSender.send_grid, grid=grid))
    if steps := list_steps(place.train):
        yield Parcel("checkpoints", str(steps), partial(RunSender.update_models, steps=steps))
    headline = selection.fill_in_selection(place)
    for step in models.list_model_steps(place, headline, largest_model):
        content = [read_meta(place.locate_step(step))["files"], describe_model(place.experiment)]
        send = partial(RunSender.send_weights, step=step)
        yield Parcel(f"model {step}", keys.hash_content(content), send)
    yield from _list_score_parcels(place, headline, in_own_run=child is None)
    files = {"": [place.experiment_yaml]}
    if headline:  # what belongs to the headline evaluation, once it is known which one that is
        files |= {
            "samples": [headline.samples_grid],
            "evaluation": [headline.metrics_json, headline.nll_json],
            "figures": [*sorted(headline.figures.glob("*.png")), *sorted(headline.figures.glob("*.svg"))],
            "report": [f for f in sorted(place.report.glob("*")) if f.name not in (MANIFEST, SEALED)],
        }
    for folder, found in files.items():
        for file in filter(Path.is_file, found):
            yield _make_parcel(f"artifact {folder}/{file.name}", file, RunSender.send_file, folder=folder)


def _list_score_parcels(place: Place, headline: Place | None, in_own_run: bool) -> Iterator[Parcel]:
    """Yield the parcels of the scores: the headline, candidates as points of a curve, the others as child runs.

    In a sweep the others are left out: they would be rows beside its trials.
    """
    found = [file for file in find_scores(place.path) if file.with_name(MANIFEST).exists()]
    # A checkpoint exists before its scores: listed after them, no candidate of these scores can be missing.
    has_candidates = bool(place.experiment.evaluate.checkpoints)
    scored = selection.list_candidates(place) if has_candidates else {}
    candidates = {candidate.scores: step for step, candidate in scored.items()}
    for file in found:
        key = file.parent.name
        if file.parent in candidates:
            step = candidates[file.parent]
            yield _make_parcel(f"candidate {key}", file, RunSender.send_candidate, step=step)
        if headline and file.parent == headline.scores:
            yield _make_parcel(f"scores {key}", file, RunSender.send_scores)
        elif file.parent not in candidates and in_own_run:
            yield _make_parcel(f"evaluation {key}", file, RunSender.send_child_evaluation)
    if has_candidates and (file := place.selection_json).exists():
        yield _make_parcel(f"selection {file.parent.name}", file, RunSender.send_selection)


def _make_tags(place: Place, parameters: dict[str, str]) -> dict[str, str]:
    """Make the tags: settings that may change and are no parameters, keys, the page's verdict, commits and versions."""
    made, report = place.read_provenance(), try_read(read_manifest, place.report, PageManifest)
    settings = _format_values(config.flatten(config.to_dict(place.experiment)))
    tags = {key: value for key, value in settings.items() if key not in parameters}
    tags |= {"run_key": place.run_key, "data_key": place.data_key}
    if made.get("user"):
        tags["mlflow.user"] = made["user"]
    if report and (verdict := report.get("verdict")):
        tags["mlflow.note.content"] = verdict
    if commit := made.get("commit"):
        earlier = [each for commits in place.read_stage_commits().values() for each in commits]
        tags |= {"commit": ", ".join(dict.fromkeys([*earlier, commit])), "mlflow.source.git.commit": commit}
    return tags | {f"version.{name}": str(version) for name, version in (made.get("versions") or {}).items()}


def _list_parameters(place: Place) -> dict[str, str]:
    """Return the parameters. The run key fixes all of them, because MLflow lets none change."""
    content, data = keys.collect_run_settings(place.experiment, whole=True), place.experiment.data
    parameters = {key: value for key, value in config.flatten(content).items() if key not in UNHASHED}
    parameters |= {"data.source": data.source, "data.image_size": data.image_size}
    if (place.data / MANIFEST).exists():
        splits = read_json(place.data / MANIFEST, ShardSetFacts)["splits"]
        parameters |= {f"data.{name}_images": split["count"] for name, split in splits.items()}
    return _format_values(parameters)


def _format_values(settings: Tree) -> dict[str, str]:
    # MLflow takes no longer values than the first thousands of characters; most runs have no betas of their own.
    return {key: str(value)[:500] for key, value in settings.items() if value or key != "diffusion.betas"}
