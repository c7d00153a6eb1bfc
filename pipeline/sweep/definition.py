"""The sweep file: experiments and values of their keys; `conf/sweep/beta_dropout.yaml` explains every key."""

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from ddpm.config import Count, Problems, Range
from pipeline.config import read_value
from pipeline.config.checks import ProblemsByKey, Tree, convert_values, find_unknown_names, flatten
from pipeline.config.files import apply_overrides, find_configuration, read_configuration
from pipeline.config.sections import FILE_NAME, NAME_RULE, CountOrNull, Seed
from pipeline.errors import ConfigError
from pipeline.scores.metrics import METRICS, Metric

Scalar = bool | int | float | str | None
Value = Scalar | list[Scalar]  # of a key of an experiment
Values = dict[str, Value]


@dataclass(frozen=True)
class PointMethod:
    """Method of drawing points from the space; a longer list of points begins with the shorter one."""

    method: Literal["grid", "one_at_a_time", "random", "sobol"] = "grid"
    points: CountOrNull = None
    seed: Seed = 0


@dataclass(frozen=True)
class Ranking:
    """Metric and direction of the leaderboard. mode: null = the direction of the metric."""

    metric: str = "fid"
    mode: Literal["min", "max"] | None = None


@dataclass(frozen=True)
class EarlyStop:
    """Settings of early stopping by asynchronous successive halving (ASHA).

    At `first` steps, and at every `factor` times as many, a trial continues if its bound is among the best 1/factor.
    """

    first: CountOrNull = None
    factor: Annotated[int, Range(ge=2)] = 3
    nll_images: Count = 32

    def list_rungs(self, steps: int) -> list[int]:
        """Return the steps at which a trial of `steps` steps is compared."""
        rungs, rung = [], self.first or steps
        while rung < steps:
            rungs.append(rung)
            rung *= self.factor
        return rungs


@dataclass(frozen=True)
class Budget:
    """Limits of a study: hours of one command, after which no trial starts, and trials; null = none."""

    hours: Annotated[float | None, Range(gt=0, le=10**6)] = None
    trials: CountOrNull = None


@dataclass(frozen=True)
class ValueRange:
    """Values from `low` to `high`; integers if both ends are."""

    low: int | float
    high: int | float
    scale: Literal["linear", "log"] = "linear"

    def pick(self, u: float) -> int | float:
        """Return the value at share u in [0, 1), rounded to six digits."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        low, high = self.low, self.high + 1 if whole else self.high
        if self.scale == "linear":
            value = low + u * (high - low)
        elif whole:
            value = low * (high / low) ** u
        else:
            value = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        return min(int(value), int(self.high)) if whole else float(f"{value:.6g}")


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep file. space: key -> the values it takes; overrides: key -> its value in all trials."""

    name: str
    experiments: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    concurrent: CountOrNull = None
    draw: PointMethod = field(default_factory=PointMethod)
    rank: Ranking = field(default_factory=Ranking)
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    budget: Budget = field(default_factory=Budget)
    space: dict[str, list[Value] | ValueRange] = field(default_factory=dict)
    overrides: Values = field(default_factory=dict)
    note: str = ""

    @property
    def metric(self) -> Metric:
        """The metric that ranks the trials, in the direction that `rank.mode` asks for."""
        metric, mode = METRICS[self.rank.metric], self.rank.mode
        return replace(metric, larger_is_better=mode == "max") if mode else metric

    @property
    def count(self) -> int:
        lengths = [len(values) for values in self.space.values() if isinstance(values, list)]
        counts = {"grid": math.prod(lengths), "one_at_a_time": 1 + sum(lengths) - len(lengths)}
        drawn = counts.get(self.draw.method, self.draw.points or 0)
        count = len(self.experiments) * drawn * max(1, len(self.seeds))
        return min(count, self.budget.trials or count)

    def find_problems(self) -> Problems:
        draw, method = self.draw, self.draw.method
        lists = method in ("grid", "one_at_a_time")  # their values decide how many points there are
        empty = not self.space and (not lists or (len(self.experiments) == 1 and not self.seeds))
        stops = bool(self.early_stop.first) and "train.steps" in self.space
        faults = [
            (not re.fullmatch(FILE_NAME, self.name), "name", f"is {self.name!r}; {NAME_RULE}"),
            (lists and draw.points, "draw.points", f"is for random and sobol, not for {method}"),
            (not lists and not draw.points, "draw.points", f"is null; draw.method={method} needs at least 1"),
            (empty, "space", f"is empty, and draw.method={method} draws from it"),
            (stops, "space.train.steps", "is swept, and early_stop compares trials at equal steps"),
        ]
        for key, items in (("experiments", list(self.experiments)), ("seeds", list(self.seeds))):
            faults.append((len(set(items)) < len(items), key, f"is {items}; each may stand there once"))
        for key, values in self.space.items():
            where = f"space.{key}"
            reserved = "cannot be swept: trials are named by their values, and seeds have a key"
            faults.append((key in ("name", "seed"), where, reserved))
            faults.append((key in self.overrides, where, "is overridden too; keep one of the two"))
            if isinstance(values, ValueRange):
                low, high, remedy = values.low, values.high, "list values, or draw.method=sobol"
                logarithm = values.scale == "log" and low <= 0
                faults += [
                    (lists, where, f"is a range, which {method} cannot have: {remedy}"),
                    (low >= high, where, f"is empty: low={low} is not below high={high}"),
                    (logarithm, where, f"begins at {low}; a log scale begins above 0"),
                ]
            else:
                doubled = len(set(map(json.dumps, values))) < len(values)
                faults.append((doubled, where, f"is {json.dumps(values)}; each value may stand there once"))
        return [(key, reason) for wrong, key, reason in faults if wrong]


def load_sweep(name: str, overrides: list[str]) -> Sweep:
    """Load a sweep file, apply `overrides` (without their `sweep.`) and check it.

    Raises ConfigError with every fault that the file alone shows.
    """
    path = find_configuration(name, "sweep")
    file = read_configuration(path, "sweep")
    tree: Tree = {"name": path.stem, **apply_overrides(file, overrides, Sweep)}
    tree.pop("note", None)  # the sweep.yaml that a study leaves can be run again
    shared = tree.pop("overrides", None) or {}
    if not isinstance(shared, dict):
        raise ConfigError(f"{path.name}: overrides is {shared!r}; it is a section of keys with their values")
    space, faults = _read_space(tree.pop("space", None) or {})
    given = {key: value for key, value in tree.items() if value is not None}
    if ("experiment" in given) == ("experiments" in given):
        faults["experiment"] = "(a name) or experiments (a list of names): one of the two is needed"
    given["experiments"] = given.pop("experiment", given.get("experiments", []))
    values, wrong = convert_values({"sweep": Sweep}, {"sweep": given}, complete=False)
    wrong = {key.removeprefix("sweep."): fault for key, fault in wrong.items()}
    wrong |= find_unknown_names(given, {"rank.metric": METRICS})
    faults |= wrong
    if not wrong:
        shared = {key: read_value(key, value) for key, value in flatten(shared).items()}
        sweep = replace(values["sweep"], space=space, overrides=shared)
        faults = dict(sweep.find_problems()) | faults
    if faults:
        raise ConfigError([f"{path.name}: {key} {fault}" for key, fault in faults.items()])
    return sweep


def _read_space(tree: Tree) -> tuple[dict[str, list[Value] | ValueRange], ProblemsByKey]:
    """Return the values of each key of the space, and the problems."""
    space: dict[str, list[Value] | ValueRange] = {}
    faults: ProblemsByKey = {}
    if not isinstance(tree, dict):
        return {}, {"space": f"is {tree!r}; it is a section of keys with their values"}
    for key, values in tree.items():
        where = f"space.{key}"
        if isinstance(values, dict):
            found, wrong = convert_values({where: ValueRange}, {where: values}, complete=False)
            faults |= wrong
            if not wrong:
                space[key] = found[where]
        elif isinstance(values, list) and values:
            space[key] = read_value(key, values)
        else:
            faults[where] = f"is {values!r}; it takes a list of values, or low, high and scale"
    return space, faults
