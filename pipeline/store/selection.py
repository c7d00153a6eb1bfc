"""Which checkpoint is the best: the candidates, what they scored, and the file that says who was chosen.

The paper reports its scores at the checkpoint of minimum FID (App. B). `selection.json`, sealed by its manifest,
holds the FID of every candidate; `pipeline.stages.select` makes it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline.config import Experiment, candidate, choose, weights_kind
from pipeline.errors import PipelineError
from pipeline.store.checkpoint import steps_on_disk
from pipeline.store.files import read_json, read_manifest, write_json, write_manifest
from pipeline.store.run import Place

log = logging.getLogger(__name__)

SELECTION = "selection.json"


def file(experiment: Experiment, run: Place) -> Path:
    """Where the selection stands that evaluate.checkpoints asks for."""
    return run.of(experiment).selection / SELECTION


def candidates(experiment: Experiment, run: Place) -> list[int]:
    """The steps on disk that evaluate.checkpoints means, ascending. What an interruption left at some other step
    is none of them: the choice must not depend on it."""
    every = experiment.evaluate.checkpoint_interval or experiment.train.checkpoint_every
    last = experiment.train.steps
    ends_it = {last} if experiment.evaluate.checkpoints == "all" else set()
    steps = steps_on_disk(run.train)
    return [step for step in steps if step <= last and (step % every == 0 or step in ends_it)]


def evaluations(experiment: Experiment, run: Place) -> dict[Path, int]:
    """The folder of every candidate's scores, made or not, with its step."""
    return {run.of(candidate(experiment, step)).scores: step for step in candidates(experiment, run)}


def write(experiment: Experiment, run: Place) -> None:
    """Choose the candidate of minimum FID, the earliest of equals, and seal the choice. All of them are scored."""
    scores, protocol = [], {}
    for folder, step in evaluations(experiment, run).items():
        metrics = read_json(folder / "metrics.json")
        scores.append({"step": step, "fid": metrics["scores"]["fid"], "evaluation": folder.name})
        protocol = metrics["protocol"]
    best = min(scores, key=lambda score: score["fid"])["step"]
    content = {
        "metric": "fid",
        "n": experiment.evaluate.checkpoint_images,
        "weights": weights_kind(experiment),
        "extractor": protocol["extractor"],
        "reference": protocol["reference"],
        "best": best,
        "scores": scores,
    }
    path = file(experiment, run)
    write_json(path, content)
    write_manifest(path.parent, [SELECTION])


def read(experiment: Experiment, run: Place) -> dict[str, Any] | None:
    """What was chosen, and from what; None where it was not, or the file is damaged."""
    path = file(experiment, run)
    try:
        return read_json(path) if read_manifest(path.parent, check="sha256") else None
    except PipelineError as error:
        log.warning("%s; the choice is made again", error)
        return None


def is_current(experiment: Experiment, run: Place) -> bool:
    """Whether the choice was made among the checkpoints that are there now."""
    found = read(experiment, run)
    steps = [score["step"] for score in found["scores"]] if found else []
    return bool(found) and steps == candidates(experiment, run)


def resolved(experiment: Experiment, run: Place) -> Experiment | None:
    """The experiment whose checkpoint is known: itself, or with the best one filled in; None where no choice was
    made yet. Everything after the choice is told of this one."""
    if experiment.sample.checkpoint != "best":
        return experiment
    found = read(experiment, run)
    return choose(experiment, found["best"], len(found["scores"])) if found else None
