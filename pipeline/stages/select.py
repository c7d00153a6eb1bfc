"""The select stage: every candidate is sampled and scored as any evaluation is, and the best is chosen.

The candidates' units are handed out together. They are those of the sample and evaluate stages, kept where these
keep them: what is scored already is not scored again, and the chosen one has its first samples.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from pipeline.compute.work import Executor, Unit
from pipeline.config import Experiment, candidate
from pipeline.console import beside
from pipeline.errors import PipelineError
from pipeline.stages import evaluate, sample
from pipeline.store import selection
from pipeline.store.checkpoint import steps_on_disk
from pipeline.store.run import Place

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0


def is_done(experiment: Experiment, run: Place) -> bool:
    """Whether the choice is made, among all that training leaves."""
    return run.step_folder(experiment.train.steps).is_dir() and selection.is_current(experiment, run)


def work(experiment: Experiment, run: Place) -> Iterator[list[Unit]]:
    """Yields the units of all candidates, then makes the choice."""
    steps = selection.candidates(experiment, run)
    _check(experiment, run, steps)
    yield from together(score(candidate(experiment, step), run) for step in steps)
    selection.write(experiment, run)


def _check(experiment: Experiment, run: Place, steps: list[int]) -> None:
    """Raise PipelineError where there is nothing to choose from; say where that is less than was asked for."""
    asked, every = experiment.evaluate.checkpoints, experiment.evaluate.checkpoint_interval
    if not steps:
        known = ", ".join(map(str, steps_on_disk(run.train))) or "none"
        raise PipelineError(
            f"{run.path} has no checkpoint for evaluate.checkpoints={asked} (there are: {known})"
        )
    if every and len(steps) < experiment.train.steps // every:
        log.warning(
            "evaluate.checkpoints=%s: %d of %d checkpoints are there; the others went before they were asked for",
            asked, len(steps), experiment.train.steps // every,
        )  # fmt: skip


def score(experiment: Experiment, run: Place) -> Iterator[list[Unit]]:
    """Samples and scores of one experiment, as far as they are missing."""
    for stage in (sample, evaluate):
        if not stage.is_done(experiment, run):
            yield from stage.work(experiment, run)


def together(works: Iterable[Iterator[list[Unit]]]) -> Iterator[list[Unit]]:
    """Several works at once, round by round; equal units (the reference's features) once."""
    running = list(works)
    if len(running) == 1:
        yield from running[0]
        return
    while running:
        rounds = [(work, next(work, None)) for work in running]
        running = [work for work, units in rounds if units is not None]
        yield list(dict.fromkeys(unit for _, units in rounds for unit in units or ()))


@contextmanager
def during_training(experiment: Experiment, run: Place, executor: Executor) -> Generator[None]:
    """Score candidates beside the body, on what training leaves free, as soon as they are on disk.

    Training neither waits for it nor ends by it: what is not scored by then, or went wrong, is the stage's.
    """
    if not (experiment.evaluate.checkpoints and executor.spare):
        yield
        return
    with beside(partial(_follow, experiment, run, executor)):
        yield


def _follow(experiment: Experiment, run: Place, executor: Executor, over: threading.Event) -> None:
    done: set[int] = set()
    try:
        while not over.wait(LOOK_SECONDS):
            # Only those that stay: others may be deleted under our hands.
            new = [s for s in selection.candidates(experiment, run) if experiment.keeps(s) and s not in done]
            for step in new:
                if not _score_now(score(candidate(experiment, step), run), executor, over):
                    return
                done.add(step)
    except Exception as error:
        log.warning("checkpoints are scored after training, since on the way: %s", error)


def _score_now(works: Iterator[list[Unit]], executor: Executor, over: threading.Event) -> bool:
    """As many units at a time as training leaves room for; whether it came to its end before training did."""
    for units in works:
        for start in range(0, len(units), executor.spare):
            batch = units[start : start + executor.spare]
            finished: list[Unit] = []
            executor.map_units(batch, finished.append)
            if over.is_set() or len(finished) < len(batch):
                return False
    return True
