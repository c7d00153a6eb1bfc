"""Scoring checkpoints while training goes on, on what it leaves free, as soon as they are on disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial

from pipeline.compute.work import Executor, Unit
from pipeline.console import run_during
from pipeline.engine.plan import BY_NAME, STAGES, list_missing
from pipeline.store.run import Place

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0


@contextmanager
def score_during_training(place: Place, executor: Executor) -> Generator[None]:
    """Score checkpoints beside the body. Training neither waits for it nor ends by it: what is not scored by then, or
    went wrong, is left to the stage that asks for it."""
    if not executor.spare:
        yield
        return
    with run_during(partial(_follow, place, executor)):
        yield


def _follow(place: Place, executor: Executor, over: threading.Event) -> None:
    done: set[tuple[str, Place]] = set()
    try:
        while not over.wait(LOOK_SECONDS):
            parts = [part for stage in STAGES for part in stage.list_early_inputs(place)]
            for name, part in parts:
                if (name, part) in done:
                    continue
                if not _score(list_missing([BY_NAME[name]], part), executor, over):
                    return
                done.add((name, part))
    except Exception as error:
        log.warning("checkpoints are scored after training, since on the way: %s", error)


def _score(rounds: Iterator[list[Unit]], executor: Executor, over: threading.Event) -> bool:
    """Do as many units at a time as training leaves room for; tell whether it came to its end before training did."""
    for units in rounds:
        for start in range(0, len(units), executor.spare):
            batch = units[start : start + executor.spare]
            finished: list[Unit] = []
            executor.map_units(batch, finished.append)
            if over.is_set() or len(finished) < len(batch):
                return False
    return True
