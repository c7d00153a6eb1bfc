"""Which checkpoint is the best: the candidates, what they scored, and the file that says which was chosen.

The paper reports its scores at the checkpoint of minimum FID (App. B). `selection.json`, sealed by its manifest,
holds the FID of every candidate; `pipeline.stages.select` makes it.
"""

from __future__ import annotations

from typing import TypedDict

from pipeline.store.checkpoint import list_steps
from pipeline.store.files import read_json, read_manifest_or_none, write_json, write_manifest
from pipeline.store.run import Place


class CandidateScore(TypedDict):
    """One candidate: its step, its FID, and the key of the evaluation that found it."""

    step: int
    fid: float
    evaluation: str


class Selection(TypedDict):
    """What selection.json holds."""

    metric: str
    n: int
    weights: str
    extractor: str
    reference: str
    best: int
    scores: list[CandidateScore]


def list_candidates(place: Place) -> dict[int, Place]:
    """List the steps on disk that evaluate.checkpoints means, ascending, each as the run that is scored for it.

    What an interruption left at some other step is none of them: the choice must not depend on it.
    """
    experiment = place.experiment
    every = experiment.evaluate.checkpoint_interval or experiment.train.checkpoint_every
    last = experiment.train.steps
    ends_it = {last} if experiment.evaluate.checkpoints == "all" else set()
    return {
        step: place.of(experiment.make_candidate(step))
        for step in list_steps(place.train, last)
        if step % every == 0 or step in ends_it
    }


def write_selection(place: Place) -> None:
    """Choose the candidate of minimum FID, the earliest of equals, and seal the choice. All of them are scored."""
    scores: list[CandidateScore] = []
    for step, scored in list_candidates(place).items():
        metrics = read_json(scored.metrics_json)
        scores.append({"step": step, "fid": metrics["scores"]["fid"], "evaluation": scored.score_key})
    protocol = metrics["protocol"]  # the same for all of them
    content: Selection = {
        "metric": "fid",
        "n": place.experiment.evaluate.checkpoint_images,
        "weights": place.experiment.weights_kind,
        "extractor": protocol["extractor"],
        "reference": protocol["reference"],
        "best": min(scores, key=lambda score: score["fid"])["step"],
        "scores": scores,
    }
    write_json(place.selection_json, content)
    write_manifest(place.selection, [place.selection_json.name])


def read_selection(place: Place) -> Selection | None:
    """Read what was chosen, and from what; None where nothing was, or the file is damaged."""
    sealed = read_manifest_or_none(place.selection, "sha256")
    found: Selection | None = read_json(place.selection_json) if sealed else None
    return found


def is_done(place: Place) -> bool:
    """Tell whether the choice was made among the checkpoints that are there now."""
    found = read_selection(place)
    return found is not None and [score["step"] for score in found["scores"]] == list(list_candidates(place))


def fill_in_selection(place: Place) -> Place | None:
    """Return the run whose checkpoint is known: itself, or with the best one filled in; None before the choice."""
    if place.experiment.sample.checkpoint != "best":
        return place
    found = read_selection(place)
    return (
        place.of(place.experiment.select_checkpoint(found["best"], len(found["scores"]))) if found else None
    )
