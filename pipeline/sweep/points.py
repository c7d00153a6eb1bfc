"""The points of a sweep, their trials, and the states of these, kept in state.json."""

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from typing_extensions import TypedDict

from pipeline.config import DataConfig, Experiment, find_relative_paths, flatten, load_experiment, to_dict
from pipeline.config.checks import Tree
from pipeline.engine import find
from pipeline.engine.names import list_known_names
from pipeline.errors import ConfigError
from pipeline.scores.metrics import LOSS
from pipeline.scores.ranking import describe_objective, format_swept_values
from pipeline.store import keys
from pipeline.store.files import read_record, write_json
from pipeline.store.run import Place, find_runs
from pipeline.sweep.definition import EarlyStop, Sweep, ValueRange, Values

STATE_FILE = "state.json"
State = Literal["new", "running", "finished", "stopped", "failed", "interrupted"]  # stopped: early, at a rung


@dataclass(frozen=True)
class SweepPoint:
    """One combination of swept values (key -> value, in the order of the file), with its experiment."""

    label: str
    swept: Values
    experiment: Experiment


def list_points(sweep: Sweep, overrides: list[str]) -> list[SweepPoint]:
    """Return every point, in the order of the file; `overrides` are key=value for all of them.

    Raises ConfigError with every fault of every experiment, each once.
    """
    for word in overrides:
        if word.partition("=")[0] in sweep.space:
            raise ConfigError(f"{word}: {sweep.name} sweeps this key; change the file, or copy it")
    common, known = format_overrides(sweep.overrides) + overrides, list_known_names()
    points: list[SweepPoint] = []
    faults: dict[str, None] = {}  # a set that keeps its order
    experiments: list[Values] = [{"experiment": name} for name in sweep.experiments]
    seeds: list[Values] = [{"seed": seed} for seed in sweep.seeds] or [{}]
    parts = (experiments if len(experiments) > 1 else [{}], _yield_space_values(sweep), seeds)
    for combination in itertools.islice(itertools.product(*parts), sweep.count):
        swept = dict(itertools.chain.from_iterable(part.items() for part in combination))
        own = {key: value for key, value in swept.items() if key != "experiment"}
        name = str(swept.get("experiment", sweep.experiments[0]))
        try:
            experiment = load_experiment(name, common + format_overrides(own), known)
            points.append(SweepPoint(format_swept_values(swept), swept, experiment))
        except ConfigError as error:
            faults |= dict.fromkeys(error.problems)
    faults |= dict.fromkeys(_find_point_problems(sweep, points))
    if faults:
        raise ConfigError(list(faults))
    return points


def find_relative_sweep_paths(sweep: Sweep, overrides: list[str]) -> list[str]:
    """Return the relative and user-specific paths of a valid sweep, as 'data.path=images', each once."""
    common = format_overrides(sweep.overrides) + overrides
    paths = (path for name in sweep.experiments for path in find_relative_paths(name, common))
    return list(dict.fromkeys(paths))


def format_overrides(values: Values) -> list[str]:
    """Return values as overrides for the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _yield_space_values(sweep: Sweep) -> Iterator[Values]:
    draw, space = sweep.draw, sweep.space
    lists = {key: values for key, values in space.items() if isinstance(values, list)}
    if draw.method == "grid":
        yield from (dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))
    elif draw.method == "one_at_a_time":
        yield (first := {key: values[0] for key, values in lists.items()})
        yield from ({**first, key: value} for key, values in lists.items() for value in values[1:])
    else:
        seen = set()
        for row in _draw_space_points(draw.method, draw.points or 0, len(space), draw.seed):
            point: Values = {
                key: values.pick(u) if isinstance(values, ValueRange) else values[int(u * len(values))]
                for (key, values), u in zip(space.items(), row, strict=True)
            }
            if (text := json.dumps(point)) not in seen:  # lists have few values: two draws may be equal
                seen.add(text)
                yield point


def _draw_space_points(method: str, count: int, dimensions: int, seed: int) -> list[list[float]]:
    """Return `count` points in [0, 1)^dimensions; a longer list begins with the shorter one."""
    if method == "random":
        return np.random.default_rng(seed).random((count, dimensions)).tolist()
    import torch

    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed)
    return engine.draw(count, dtype=torch.float64).clamp(max=1 - 1e-9).tolist()


def _find_point_problems(sweep: Sweep, points: list[SweepPoint]) -> list[str]:
    """Find reasons why these points cannot be ranked or stopped early."""
    metric, first = sweep.metric, sweep.early_stop.first
    experiments = [point.experiment for point in points]
    objectives = {json.dumps(describe_objective(experiment)) for experiment in experiments}
    keys = ", ".join(key for key in sweep.space if key.startswith("diffusion.")) or "the experiments"
    scored = [experiment.evaluate.metrics for experiment in experiments]
    faults = []
    if metric.name == LOSS.name and len(objectives) > 1:
        remedy = "rank by nll_bpd or fid"
        faults.append(f"rank.metric={LOSS.name}: losses are not comparable over {keys}; {remedy}")
    if scored and metric.family is not None and not any(metric.family in metrics for metrics in scored):
        reason = f"is reported by no trial: evaluate.metrics is [{', '.join(scored[0])}]"
        faults.append(f"rank.metric={metric.name} {reason}; add {metric.family} to it")
    if first and any(experiment.train.lr_decay != "none" for experiment in experiments):
        faults.append("early_stop needs train.lr_decay=none: a rate that decays makes other runs")
    if first and any(experiment.train.steps <= first for experiment in experiments):
        faults.append(f"early_stop.first={first} is not below train.steps: nothing would be stopped")
    return faults


@dataclass(frozen=True)
class Trial:
    """A point with its place. key: the run key, and a hash of the swept values outside it."""

    key: str
    label: str
    swept: Values
    place: Place


def make_trials(points: list[SweepPoint], root: Path) -> list[Trial]:
    """Return the trial of each point. Raises ConfigError if two points are the same trial."""
    trials: dict[str, Trial] = {}
    known: dict[DataConfig, Place] = {}  # reading a source's fingerprint can take a while
    runs = [path.name for path in find_runs(root)]
    faults = []
    for point in points:
        data = point.experiment.data
        if data not in known:
            known[data] = find.make_place(point.experiment, root)
        run_key = keys.make_run_key(point.experiment, known[data].data_key)
        place = replace(known[data], experiment=point.experiment, run_key=run_key)
        names = [name for name in runs if name.endswith(f"-{run_key}")]
        if names and place.name not in names:  # a run under another experiment's name, with the same numbers
            experiment = replace(point.experiment, name=min(names).removesuffix(f"-{run_key}"))
            place = replace(place, experiment=experiment)
        # Swept values that are not part of the run key make other samples or scores of one run.
        inside = flatten(keys.collect_run_settings(point.experiment, whole=True))
        rest = {key: value for key, value in point.swept.items() if key not in inside}
        other = {k: value for k, value in rest.items() if k.partition(".")[0] not in ("data", "experiment")}
        key = f"{run_key}-{keys.hash_content(other)}" if other else run_key
        if key in trials:
            faults.append(f"'{point.label}' and '{trials[key].label}' are the same trial; leave one out")
        trials[key] = Trial(key, point.label, point.swept, place)
    if faults:
        raise ConfigError(faults)
    return list(trials.values())


class TrialState(TypedDict):
    """State of one trial. label, run: for people who read the file; rungs: (step, bound, Unix ms)."""

    state: State
    reason: str
    label: str
    run: str
    rungs: list[tuple[int, float, int]]


class StudyFile(TypedDict, total=False):
    early_stop: Tree
    trials: dict[str, TrialState]


def count_sharing_trials(folder: Path, slots: int) -> int:
    """Return how many trials share the cluster, by the study's state file: those that run or wait, and fit at once."""
    trials = read_record(folder / STATE_FILE, StudyFile).get("trials", {}).values()
    left = sum(trial["state"] in ("new", "running", "interrupted") for trial in trials)
    return max(1, min(left, slots))


class TrialStates:
    """States of all trials, which the driver writes to state.json at every change.

    They begin with that file, corrected by the run directories; rungs of other settings are not comparable and dropped.
    """

    def __init__(self, folder: Path, early_stop: EarlyStop, trials: Iterable[Trial]):
        from pipeline.engine.plan import list_unfinished_stages  # it imports the stages, and torch

        self.path, self.early_stop, self.factor = folder / STATE_FILE, to_dict(early_stop), early_stop.factor
        self.keys: list[str] = []
        content = read_record(self.path, StudyFile)
        self.records = content.get("trials", {})
        if content.get("early_stop") != self.early_stop:
            for record in self.records.values():
                record["rungs"] = []
                record["state"] = "new" if record["state"] == "stopped" else record["state"]
        for trial in trials:
            new = TrialState(state="new", reason="", label="", run="", rungs=[])
            record = self.records.setdefault(trial.key, new)
            record["label"], record["run"] = trial.label, trial.place.name
            self.keys.append(trial.key)
            if not list_unfinished_stages(trial.place, "report"):
                record["state"], record["reason"] = "finished", ""
            elif record["state"] in ("finished", "running"):  # files deleted, or driver killed
                record["state"], record["reason"] = "interrupted", ""

    def is_done(self, key: str) -> bool:
        return self.records[key]["state"] in ("finished", "stopped")

    def set_state(self, key: str, state: State, reason: str = "") -> None:
        record = self.records[key]
        record["state"], record["reason"] = state, reason
        self._save()

    def should_continue(self, key: str, step: int, bound: float) -> bool:
        """Record the bound at a rung, and decide whether the trial continues (ASHA).

        It does if its bound is among the best 1/factor of those that other trials have there by now. A resumed trial
        that comes again continues, and its first time stays.
        """
        own = self.records[key]["rungs"]
        if step in [rung[0] for rung in own]:
            return True
        others = [known for trial in self.keys for at, known, _ in self.records[trial]["rungs"] if at == step]
        own.append((step, bound, time.time_ns() // 1_000_000))
        best = (1 - 1 / self.factor) * 100
        if others and -bound < np.nanpercentile(np.negative(others), best):
            self.set_state(key, "stopped", f"stopped early at {step} steps")
            return False
        self._save()
        return True

    def _save(self) -> None:
        write_json(self.path, {"early_stop": self.early_stop, "trials": self.records})
