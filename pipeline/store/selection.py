"""The selection of the best checkpoint: candidates, their scores, and the file.

The paper reports its scores at the checkpoint of minimum FID (App. B). `selection.json`, sealed by its manifest,
holds the FID of every candidate; `pipeline.stages.select` makes it.
"""

from typing import Any, NotRequired

from typing_extensions import TypedDict

from pipeline.store import files
from pipeline.store.run import Place, list_steps


class CandidateScore(TypedDict):
    """Step, FID with its standard error, and score key of one candidate; earlier files lack the error."""

    step: int
    fid: float
    fid_se: NotRequired[float | None]
    evaluation: str


class ScoreFile(TypedDict):
    """Keys that every metrics.json has."""

    scores: dict[str, Any]
    protocol: dict[str, Any]


class Selection(TypedDict):
    """Content of selection.json: the selected step and the score of each candidate."""

    metric: str
    n: int
    weights: str
    extractor: str
    reference: str
    best: int
    scores: list[CandidateScore]


def list_candidates(place: Place) -> dict[int, Place]:
    """Return the place of each candidate checkpoint, by step, ascending.

    A checkpoint that an interruption left at another step is no candidate: the selection must not depend on it.
    """
    experiment, last = place.experiment, place.experiment.train.steps
    every = experiment.evaluate.checkpoint_interval or experiment.train.checkpoint_every
    ends = {last} if experiment.evaluate.checkpoints == "all" else set()
    steps = [step for step in list_steps(place.train, last) if step % every == 0 or step in ends]
    return {step: place.replace_experiment(experiment.make_candidate(step)) for step in steps}


def write_selection(place: Place) -> None:
    """Select the candidate with the lowest FID, the earliest of equals, and seal the selection."""
    scores: list[CandidateScore] = []
    for step, candidate in list_candidates(place).items():
        metrics = files.read_sealed(candidate.metrics_json, ScoreFile)
        fid, error = metrics["scores"]["fid"], metrics["scores"].get("fid_se")
        scores.append({"step": step, "fid": fid, "fid_se": error, "evaluation": candidate.score_key})
    protocol = metrics["protocol"]  # the same for all of them
    content: Selection = {
        "metric": "fid", "n": place.experiment.evaluate.checkpoint_images,
        "weights": place.experiment.weights_kind, "extractor": protocol["extractor"],
        "reference": protocol["reference"], "best": min(scores, key=lambda score: score["fid"])["step"],
        "scores": scores,
    }  # fmt: skip
    (place.selection / files.MANIFEST).unlink(missing_ok=True)  # a reader never sees half of both
    files.write_json(place.selection_json, content)
    files.write_manifest(place.selection, [place.selection_json.name])


def read_selection(place: Place) -> Selection | None:
    """Return the selection; None if it is missing or damaged."""
    if files.try_read(files.read_manifest, place.selection, files.Manifest) is None:
        return None
    return files.try_read(files.read_sealed, place.selection_json, Selection)


def is_done(place: Place) -> bool:
    """Return whether the selection covers the checkpoints that exist now."""
    found = read_selection(place)
    return found is not None and [score["step"] for score in found["scores"]] == list(list_candidates(place))


def fill_in_selection(place: Place) -> Place | None:
    """Return the place with its selected checkpoint; None before the selection."""
    if place.experiment.sample.checkpoint != "best":
        return place
    if (found := read_selection(place)) is None:
        return None
    return place.replace_experiment(place.experiment.select_checkpoint(found["best"], len(found["scores"])))
