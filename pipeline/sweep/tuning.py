"""Runs the trials of a study by Ray Tune, with early stopping.

A trial holds no CPU itself: its training workers and tasks ask for CPUs and GPUs (`pipeline.sweep.shares`).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.compute.ray_train import release_training_group, run_in_thread
from pipeline.compute.resources import LEADER_BYTES
from pipeline.compute.session import RaySession
from pipeline.errors import PipelineError
from pipeline.sweep.points import TrialStates, count_sharing_trials
from pipeline.sweep.recorder import StudyRecorder
from pipeline.sweep.shares import TrialSlots
from pipeline.sweep.trial import TrialInputs, format_cause, run_trial

BOUND, STEP = "nll_bpd", "step"
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run directory has its own log
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial without rungs reports nothing to Tune
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints its boxes even if it is set to be quiet
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class EarlyStopScheduler(FIFOScheduler):
    """Stops the trials that are stopped at a rung."""

    def __init__(self, states: TrialStates):
        super().__init__()
        self.states = states

    def on_trial_result(self, tune_controller, trial, result):
        rung = [result[key] for key in (STEP, BOUND) if key in result]
        goes_on = not rung or self.states.should_continue(trial.config["trial"], *rung)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


class _StatelessMixin:
    """Mixin that gives Tune nothing to pickle: a study resumes from its own files."""

    def __getstate__(self):
        return {}


class _TrialQueue(_StatelessMixin, Searcher):
    """Gives Tune the trials in order, while the study may start one and as many at once as now have room."""

    def __init__(self, keys: list[str], may_start_trial: Callable[[], bool], count_slots: Callable[[], int]):
        super().__init__()
        self.keys, self.may_start_trial = list(reversed(keys)), may_start_trial
        self.count_slots, self.running = count_slots, 0

    def suggest(self, trial_id):
        if not (self.keys and self.may_start_trial()):
            return Searcher.FINISHED
        if self.running >= self.count_slots():
            return None  # Tune asks again
        self.running += 1
        return {"trial": self.keys.pop()}

    def on_trial_complete(self, *trial, **info):
        self.running -= 1

    def _ignore(self, *arguments, **options):
        """Do nothing: the state is in the run directories."""

    save = restore = _ignore


class _TuneCallback(_StatelessMixin, TrialProgressCallback):
    """Reports starts and ends of trials to the recorder; it replaces Tune's own printer."""

    def __init__(self, recorder: StudyRecorder, tasks: dict[str, TrialInputs]):
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


def run_trials(
    tasks: dict[str, TrialInputs], share: TrialSlots, recorder: StudyRecorder,
    poll: Callable[[], object],
) -> None:  # fmt: skip
    """Run the trials by Tune in this Ray session until all have ended, and call `poll` repeatedly meanwhile."""
    os.environ.update(QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the recorder says what happens
    folder = recorder.folder / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    # CPUs belong to the workers; the memory spreads the trials over the nodes.
    largest = max(int(node["Resources"].get("memory", 1)) for node in ray.nodes() if node["Alive"])
    trainable = tune.with_parameters(_run_tune_trial, tasks=tasks, share=share)
    trainable = tune.with_resources(trainable, {"cpu": 0, "memory": min(LEADER_BYTES, largest)})

    def count_slots() -> int:
        return share.count_slots(RaySession.list_nodes())

    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_TrialQueue(list(tasks), recorder.may_start_trial, count_slots),
            scheduler=EarlyStopScheduler(recorder.states),
            num_samples=len(tasks),
            reuse_actors=True,  # its imports take a process longer than a small trial
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[_TuneCallback(recorder, tasks)],
            failure_config=tune.FailureConfig(max_failures=0),  # the same command tries again
        ),
    )
    error = run_in_thread(tuner.fit, "ray-tune", poll)
    if error is not None:
        raise PipelineError(f"Ray Tune gave up: {format_cause(error)}; the same command continues") from error


def _run_tune_trial(given: dict[str, str], tasks: dict[str, TrialInputs], share: TrialSlots) -> object:
    """Run one trial in its process, called by Tune, which may end it inside `report`; return {"error": text}."""
    task = tasks[given["trial"]]

    def count_trials() -> int:
        return count_sharing_trials(task.stop_file.parent, share.count_slots(RaySession.list_nodes()))

    with RaySession.open_for_trial(task.cluster, share.resources, task.should_stop, count_trials) as session:

        def report(step: int, bound: float) -> bool:
            session.pool.end_idle_actors()  # before Tune may end this process
            tune.report({STEP: step, BOUND: bound})
            return True

        error = run_trial(task, session, report)
    return {"error": error} if error else None
