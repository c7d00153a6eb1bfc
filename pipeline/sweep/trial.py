"""Runs a trial in its process: all its stages; with early stopping, a part from one rung to the next."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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

    @property
    def parts(self) -> list[int | None]:
        """The steps of each part: of the rungs, then None, which goes to the end."""
        return [*self.early_stop.list_rungs(self.place.experiment.train.steps), None]

    def should_stop(self) -> bool:
        return self.stop_file.exists()

    def copy_stop_file(self) -> None:
        """Write the run's stop file when the study's appears: the training workers look there."""
        if self.should_stop() and self.place.path.exists():
            self.place.stop_file.touch()


class PartResult(NamedTuple):
    """The end of a part of a trial: the bound at its rung, or else the error as text if there was one."""

    bound: float | None = None
    error: str | None = None


def run_part(task: TrialInputs, executor: Executor, steps: int | None) -> PartResult:
    """Run the unfinished stages of one of `task.parts`."""
    experiment = task.place.experiment
    part = limit_to_rung(experiment, steps, task.early_stop.nll_images) if steps else experiment
    place = task.place.replace_experiment(part)
    try:
        with poll_in_thread(task.copy_stop_file):
            if task.should_stop():
                return PartResult()  # the files on disk say how far it came
            last = "evaluate" if steps else "report"
            stages.run_trial_stages(executor, place, last, experiment, task.accept_code)
        return PartResult(read_sealed(place.metrics_json, Results)["scores"]["nll_bpd"] if steps else None)
    except StopRequest:
        return PartResult()
    except Exception as error:
        return PartResult(error=format_cause(error))


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
