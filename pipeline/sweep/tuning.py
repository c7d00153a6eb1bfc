"""Ray Tune: which trial comes next, how many at once, and which of them is stopped early.

A trial is a function of no CPU that runs the stages against the Ray session it lives in; its training workers
and tasks ask for the CPUs and GPUs. So the number of trials at once is what keeps them from waiting for each
other (`pipeline.sweep.resources`).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.compute.ray_train import release_training_group, run_in_thread
from pipeline.compute.resources import Resources
from pipeline.compute.session import RaySession
from pipeline.errors import PipelineError
from pipeline.sweep.definition import EarlyStop
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.points import Trial
from pipeline.sweep.recorder import Recorder
from pipeline.sweep.resources import Share
from pipeline.sweep.work import Task, explain_error, run_trial

BOUND, STEP = "nll_bpd", "step"
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run directory has its own log
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial without rungs reports nothing to Tune
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one draws its boxes however quiet it is to be
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class RungScheduler(ASHAScheduler):
    """ASHA over the bounds that trials report at their rungs, which the ledger keeps.

    It begins with the rungs of trials that have ended before, so a resumed study judges as an uninterrupted one
    would.
    """

    def __init__(self, stop: EarlyStop, trials: Mapping[str, Trial], ledger: Ledger):
        steps = max(trial.place.experiment.train.steps for trial in trials.values())
        super().__init__(
            STEP, BOUND, "min", max_t=steps, grace_period=stop.first or steps,
            reduction_factor=stop.factor, stop_last_trials=False,
        )  # fmt: skip
        self.ledger = ledger
        for key in filter(ledger.is_done, trials):
            for step, bound, _ in ledger.records[key].rungs:
                self.judge(key, step, bound)

    def judge(self, key: str, step: int, bound: float) -> bool:
        """Tell whether a trial that Tune does not run is worth going on."""
        trial = SimpleNamespace(trial_id=key, config={"trial": key})
        return self._judge(trial, {STEP: step, BOUND: bound}) != TrialScheduler.STOP

    def _judge(self, trial, result, controller=None):
        self.on_trial_add(controller, trial)
        return self.on_trial_result(controller, trial, result)

    def on_trial_result(self, tune_controller, trial, result):
        action, key = super().on_trial_result(tune_controller, trial, result), trial.config["trial"]
        if BOUND in result and not self.ledger.is_done(key):
            self.ledger.record_rung(key, result[STEP], result[BOUND])
            if action == TrialScheduler.STOP:  # nothing else would say why it ended
                self.ledger.record_state(key, "stopped", f"stopped early at {result[STEP]} steps")
        return action


class _Unpickled:
    """Tune pickles what it could be restored from; a study is resumed from its files instead."""

    def __getstate__(self):
        return {}


class _TrialQueue(_Unpickled, Searcher):
    """Gives out the trials one by one, until no further one is to be started."""

    def __init__(self, keys: list[str], should_stop: Callable[[], bool]):
        super().__init__()
        self.keys, self.should_stop = list(reversed(keys)), should_stop

    def suggest(self, trial_id):
        return {"trial": self.keys.pop()} if self.keys and not self.should_stop() else Searcher.FINISHED

    def _ignore(self, *arguments, **options):
        """Do nothing: the run directories remember."""

    on_trial_complete = save = restore = _ignore


class _TrialObserver(_Unpickled, TrialProgressCallback):
    """Passes on to the recorder what Tune notices, and stands where Tune's own printer would. A trial that fails
    says why in its last result."""

    def __init__(self, recorder: Recorder, tasks: dict[str, Task]):
        super().__init__()
        self.recorder, self.tasks = recorder, tasks

    def on_trial_result(self, *trial, **info):
        """Print nothing."""

    def on_trial_start(self, iteration, trials, trial, **info):
        self.recorder.start_trial(trial.config["trial"])

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._end(trial.config["trial"], trial.last_result.get("error"))

    def on_trial_error(self, iteration, trials, trial, **info):
        self._end(trial.config["trial"], "its process was lost; Ray's logs in /tmp/ray say more")

    def _end(self, key: str, error: str | None) -> None:
        release_training_group(self.tasks[key].place)
        self.recorder.end_trial(key, error)


def run_tasks(
    tasks: dict[str, Task], share: Share, recorder: Recorder, scheduler: RungScheduler | None, folder: Path
) -> None:
    """Run them all, so many at once, in the Ray session of this process; return when all have ended."""
    os.environ.update(QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the recorder says what happens
    shutil.rmtree(folder, ignore_errors=True)
    # Tune wants to reserve something, and CPUs belong to the workers: a byte.
    trainable = tune.with_resources(
        tune.with_parameters(_run_task, tasks=tasks, resources=share.resources), {"cpu": 0, "memory": 1}
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_TrialQueue(list(tasks), recorder.should_stop),
            scheduler=scheduler,
            num_samples=len(tasks),
            max_concurrent_trials=share.slots,
            reuse_actors=True,  # its imports take a process longer than a small trial
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[_TrialObserver(recorder, tasks)],
            failure_config=tune.FailureConfig(max_failures=0),  # the same command tries again
        ),
    )
    error = run_in_thread(tuner.fit, "ray-tune")
    if error is not None:
        raise PipelineError(f"Ray Tune gave up: {explain_error(error)}; the same command goes on") from error


def _run_task(given: dict[str, str], tasks: dict[str, Task], resources: Resources) -> dict[str, str] | None:
    """Run a trial in Tune's process for it. Tune ends it while it waits in `report`, when nothing is under way."""
    task = tasks[given["trial"]]
    with RaySession.open_share(task.cluster, resources, task.interrupted) as session:

        def report(step: int, bound: float) -> bool:
            session.pool.end()  # before Tune may end this process
            tune.report({STEP: step, BOUND: bound})
            return True

        error = run_trial(task, session, report)
    return {"error": error} if error else None
