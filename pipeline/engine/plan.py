"""Which stages there are, what each needs, and which of them still have work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.compute.work import Unit
from pipeline.stages import evaluate, figures, report, sample, select, shard, train
from pipeline.stages.stage import Stage
from pipeline.store import selection
from pipeline.store.run import Place

STAGES: tuple[Stage, ...] = (
    shard.STAGE, train.STAGE, select.STAGE, sample.STAGE, evaluate.STAGE, figures.STAGE, report.STAGE,
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}


def list_needed(place: Place, last: str) -> list[Stage]:
    """List `last` and all that it needs, in order."""
    names = {last}
    for stage in reversed(STAGES):  # a stage needs earlier ones
        if stage.name in names:
            names.update(stage.list_required(place.experiment))
    return [stage for stage in STAGES if stage.name in names]


def list_pending(place: Place, last: str) -> list[Stage]:
    """List the stages that `last` needs, itself included, that still have work, in order.

    While the choice among checkpoints is open, the stages that work on the chosen one count as not done.
    """
    todo: list[Stage] = []
    for stage in list_needed(place, last):
        waits = stage.uses_checkpoint and any(earlier.selects_checkpoint for earlier in todo)
        if (
            waits
            or (stage.shows_other_stages and todo)
            or not stage.is_done(fill_in_checkpoint(stage, place))
        ):
            todo.append(stage)
    return todo


def fill_in_checkpoint(stage: Stage, place: Place) -> Place:
    """Return what the stage works on: the run as it was asked for, or with the checkpoint that was chosen."""
    if not stage.uses_checkpoint:
        return place
    found = selection.resolve(place)
    assert found is not None, "the choice comes first"
    return found


def list_rounds(stage: Stage, place: Place) -> Iterator[list[Unit]]:
    """Yield the rounds of units of a stage: those of the parts that it puts together, all at once, then its own."""
    parts: dict[Place, list[Stage]] = {}
    for name, part in stage.list_inputs(place):
        parts.setdefault(part, []).append(BY_NAME[name])
    yield from merge_rounds(list_missing(stages, part) for part, stages in parts.items())
    yield from stage.work(place)


def list_missing(stages: Iterable[Stage], place: Place) -> Iterator[list[Unit]]:
    """Yield the rounds of those stages that are not done, one stage after the other."""
    for stage in stages:
        if not stage.is_done(place):
            yield from stage.work(place)


def merge_rounds(works: Iterable[Iterator[list[Unit]]]) -> Iterator[list[Unit]]:
    """Do several works at once, round by round; equal units (the reference's features) once."""
    running = list(works)
    while running:
        rounds = [(work, next(work, None)) for work in running]
        running = [work for work, units in rounds if units is not None]
        yield list(dict.fromkeys(unit for _, units in rounds for unit in units or ()))
