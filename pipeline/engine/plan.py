"""The order of the stages, and which of them are not done."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.compute.units import Unit
from pipeline.stages import evaluate, figures, report, sample, select, shard, train
from pipeline.stages.stage import Stage
from pipeline.store import selection
from pipeline.store.run import Place

STAGES: tuple[Stage, ...] = (
    shard.STAGE, train.STAGE, select.STAGE, sample.STAGE, evaluate.STAGE, figures.STAGE, report.STAGE,
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}


def list_required_stages(place: Place, last: str) -> list[Stage]:
    """Return `last` and all stages that it needs, in order."""
    names = {last}
    for stage in reversed(STAGES):  # a stage needs earlier ones
        if stage.name in names:
            names.update(stage.list_required_stages(place.experiment))
    return [stage for stage in STAGES if stage.name in names]


def list_unfinished_stages(place: Place, last: str) -> list[Stage]:
    """Return the unfinished stages among `last` and those that it needs, in order.

    Until the best checkpoint is selected, the stages that work on it count as not done.
    """
    todo: list[Stage] = []
    for stage in list_required_stages(place, last):
        waits = stage.uses_checkpoint and any(earlier.selects_checkpoint for earlier in todo)
        if waits or (stage.shows_other_stages and todo) or not stage.is_done(find_stage_place(stage, place)):
            todo.append(stage)
    return todo


def find_stage_place(stage: Stage, place: Place) -> Place:
    """Return the place that a stage works on, with the selected checkpoint if the stage uses it."""
    found = selection.fill_in_selection(place) if stage.uses_checkpoint else place
    assert found is not None, "the selection comes first"
    return found


def list_rounds(stage: Stage, place: Place) -> Iterator[list[Unit]]:
    """Yield the rounds of units of a stage: those that make its inputs, then its own.

    Inputs of different places are made at the same time; equal units (the features of the reference) are yielded once.
    """
    inputs: dict[Place, list[Stage]] = {}
    for name, subject in stage.list_inputs(place):
        inputs.setdefault(subject, []).append(BY_NAME[name])
    running = [_yield_input_rounds(stages, subject) for subject, stages in inputs.items()]
    while running:
        rounds = [(work, next(work, None)) for work in running]
        running = [work for work, units in rounds if units is not None]
        yield list(dict.fromkeys(unit for _, units in rounds for unit in units or ()))
    yield from stage.work(place)


def _yield_input_rounds(stages: list[Stage], place: Place) -> Iterator[list[Unit]]:
    """Yield the rounds of those stages that are not done, one stage after the other."""
    for stage in stages:
        if not stage.is_done(place):
            yield from stage.work(place)
