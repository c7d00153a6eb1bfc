"""Ray Tune: which trial comes next, how many at once, and which of them is stopped early.

A trial is a function of no CPU that runs the stages against the Ray session it lives in; its training workers
and tasks ask for the CPUs and GPUs. So the number of trials at once is what keeps them from waiting for each
other (`pipeline.sweep.resources`).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.compute.interrupt import Interrupted
from pipeline.compute.session import Session
from pipeline.compute.training import release, run_off_main_thread
from pipeline.errors import PipelineError, last_line
from pipeline.store.files import write_text
from pipeline.sweep.definition import Sweep
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.work import Order, carry_out

BOUND, STEP = "nll_bpd", "step"
NOBODY: Any = None  # the controller, of whom ASHA wants nothing
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run directory has its own log
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial without rungs reports nothing to Tune
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one draws its boxes however quiet it is to be
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class Board(Protocol):
    """Who is told what becomes of the trials."""

    ledger: Ledger

    def started(self, key: str) -> None: ...

    def ended(self, key: str, error: str | None) -> None: ...

    def closed(self) -> bool: ...


class Rungs(ASHAScheduler):
    """ASHA over the bounds that trials report at their rungs, which the ledger keeps.

    It begins with the rungs of trials that an earlier command ended, so a resumed sweep judges as an
    uninterrupted one would.
    """

    def __init__(self, sweep: Sweep, steps: int, ledger: Ledger, past: list[str]):
        stop = sweep.early_stop
        super().__init__(
            STEP, BOUND, "min", max_t=steps, grace_period=stop.first or steps,
            reduction_factor=stop.factor, stop_last_trials=False,
        )  # fmt: skip
        self.ledger = ledger
        for key in past:
            trial = judged_by_hand(key)
            self.on_trial_add(NOBODY, trial)
            for step, bound, _ in ledger.of(key).rungs:
                super().on_trial_result(NOBODY, trial, {STEP: step, BOUND: bound})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        if BOUND in result:
            self.ledger.note_rung(trial.config["trial"], result[STEP], result[BOUND])
            if action == TrialScheduler.STOP:
                self.ledger.stop(trial.config["trial"], result[STEP])
        return action


def by_hand(scheduler: Rungs, key: str) -> Callable[[int, float], bool]:
    """The scheduler's word on one trial that runs in this process."""
    trial = judged_by_hand(key)
    scheduler.on_trial_add(NOBODY, trial)
    return lambda step, bound: (
        scheduler.on_trial_result(NOBODY, trial, {STEP: step, BOUND: bound}) != TrialScheduler.STOP
    )


def judged_by_hand(key: str) -> Any:
    """What a scheduler wants of a trial that Tune does not run."""
    return SimpleNamespace(trial_id=key, config={"trial": key})


class _Unsaved:
    """Tune pickles what it could be restored from; a sweep is resumed from its files instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Next(_Unsaved, Searcher):
    """Gives out the trials one by one, until the board is closed."""

    def __init__(self, keys: list[str], closed: Callable[[], bool]):
        super().__init__()
        self.keys, self.closed = list(reversed(keys)), closed

    def suggest(self, trial_id: str) -> Any:
        if self.closed() or not self.keys:
            return Searcher.FINISHED
        return {"trial": self.keys.pop()}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:  # the run directories remember
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Told(_Unsaved, TrialProgressCallback):
    """Passes on to the board what Tune notices, and stands where Tune's own printer would. A trial that fails
    says why in a file, and ends in peace."""

    def __init__(self, board: Board, orders: dict[str, Order], failures: Path):
        super().__init__()
        self.board, self.orders, self.failures = board, orders, failures

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self.board.started(trial.config["trial"])

    def on_trial_result(self, *_: Any, **__: Any) -> None:
        pass

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        failure = self.failures / trial.config["trial"]
        self._ended(trial.config["trial"], failure.read_text() if failure.exists() else None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._ended(trial.config["trial"], "its process was lost; Ray's logs in /tmp/ray say more")

    def _ended(self, key: str, error: str | None) -> None:
        release(self.orders[key].run)
        self.board.ended(key, error)


def one_line(error: BaseException) -> str:
    """The reason in a user's words: the cause, without the layers that carried it."""
    while getattr(error, "cause", None) is not None:
        error = error.cause  # type: ignore[attr-defined]
    if isinstance(error, PipelineError):
        return " ".join(str(error).split())
    return last_line(error)


def run_trials(
    orders: dict[str, Order], slots: int, board: Board, scheduler: FIFOScheduler | None, folder: Path
) -> None:
    """Run them all, at most `slots` at once, in the Ray session of this process; returns when all have ended."""
    os.environ.update(QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the board says what happens
    shutil.rmtree(folder, ignore_errors=True)
    failures = folder / "failures"
    tuner = tune.Tuner(
        # Tune wants to reserve something, and CPUs belong to the workers: a byte.
        tune.with_resources(tune.with_parameters(_trial, orders=orders, failures=failures), {"cpu": 0, "memory": 1}),
        tune_config=tune.TuneConfig(
            search_alg=_Next(list(orders), board.closed),
            scheduler=scheduler,
            num_samples=len(orders),
            max_concurrent_trials=slots,
            reuse_actors=True,  # its imports take a process longer than a small trial
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(folder), verbose=0, callbacks=[_Told(board, orders, failures)],
            failure_config=tune.FailureConfig(max_failures=0),  # the same command tries again
        ),
    )  # fmt: skip
    error = run_off_main_thread(tuner.fit, "ray-tune")
    if error is not None:
        raise PipelineError(f"Ray Tune gave up: {one_line(error)}; the same command goes on") from error


def _trial(given: dict[str, Any], orders: dict[str, Order], failures: Path) -> None:
    """What Tune's process for a trial runs. Tune ends it while it waits in `report`, when nothing is under way."""
    order = orders[given["trial"]]
    with Session.within(order.cluster, order.resources, order.interrupted) as session:

        def goes_on(step: int, bound: float) -> bool:
            session.pool.end()  # before Tune may end this process
            tune.report({STEP: step, BOUND: bound})
            return True

        try:
            carry_out(order, session, goes_on)
        except Interrupted:
            pass  # what is on disk says how far it came
        except Exception as error:
            write_text(failures / given["trial"], one_line(error))
