"""Runs one trial in its process: all its stages; with early stopping, from one rung to the next."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.compute.interrupt import StopRequest
from pipeline.compute.units import Executor
from pipeline.config import ClusterConfig, Experiment
from pipeline.console import poll_in_thread
from pipeline.engine import execute as stages
from pipeline.errors import PipelineError, shorten_error
from pipeline.scores.metrics import Results
from pipeline.store.files import read_sealed
from pipeline.store.run import Place
from pipeline.sweep.definition import EarlyStop


@dataclass(frozen=True)
class TrialInputs:
    """Arguments of one trial's process. stop_file: that of the study."""

    place: Place
    cluster: ClusterConfig
    stop_file: Path
    early_stop: EarlyStop
    accept_code: bool = False

    def should_stop(self) -> bool:
        return self.stop_file.exists()

    def copy_stop_file(self) -> None:
        """Write the run's stop file when the study's appears: the training workers look there."""
        if self.should_stop() and self.place.path.exists():
            self.place.stop_file.touch()


def run_trial(task: TrialInputs, executor: Executor, decide: Callable[[int, float], bool]) -> str | None:
    """Run a trial's unfinished stages; return the error as text, or None.

    `decide(step, bound)` says at each rung whether the trial continues.
    """
    place, stop = task.place, task.early_stop
    rungs = [(steps, "evaluate") for steps in stop.list_rungs(place.experiment.train.steps)]
    try:
        with poll_in_thread(task.copy_stop_file):
            for steps, last in [*rungs, (None, "report")]:
                if task.should_stop():
                    return None  # the files on disk say how far it came
                rung = limit_to_rung(place.experiment, steps, stop.nll_images) if steps else place.experiment
                part = place.replace_experiment(rung)
                stages.run_trial_stages(
                    executor, task.should_stop, task.cluster, part, last, place.experiment, task.accept_code
                )
                if steps:
                    scores = read_sealed(part.metrics_json, Results)["scores"]
                    if not decide(steps, scores["nll_bpd"]):
                        return None
    except StopRequest:
        pass
    except Exception as error:
        return format_cause(error)
    return None


def format_cause(error: BaseException) -> str:
    """Return the cause of an error as text, without the errors that wrap it."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    return " ".join(str(error).split()) if isinstance(error, PipelineError) else shorten_error(error)


def limit_to_rung(experiment: Experiment, steps: int, nll_images: int) -> Experiment:
    """Return the experiment with training up to a rung and the bound as its only score.

    The run key does not hold the steps: the next rung extends the same run.
    """
    bound = replace(experiment.evaluate, metrics=("nll",), nll_split="test", nll_images=nll_images)
    return replace(
        experiment,
        train=replace(experiment.train, steps=steps),
        sample=replace(experiment.sample, checkpoint="last"),
        evaluate=replace(bound, nll_timesteps=None, checkpoints=None),
    )
