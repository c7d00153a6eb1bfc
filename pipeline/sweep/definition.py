"""A sweep file: which experiments, over which values of their keys, how many at once, ranked by what."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from ddpm.config import Count, Problems, Range
from pipeline.config.checks import Faults, Tree, check_names, check_values, flatten
from pipeline.config.files import apply_overrides, find_file, read_file
from pipeline.config.sections import FILE_NAME, CountOrNull
from pipeline.errors import ConfigError
from pipeline.scores.metrics import METRICS, Metric

Value = bool | int | float | str | None | list["Value"]  # of a key of an experiment
Values = dict[str, Value]


@dataclass(frozen=True)
class Draw:
    """How points are taken from the space: every combination (grid), every value of one key with the first ones of
    all others (one_at_a_time), or `points` of them, at random or by a Sobol sequence, which fills the space evenly.
    More points keep those that are there."""

    method: Literal["grid", "one_at_a_time", "random", "sobol"] = "grid"
    points: CountOrNull = None
    seed: int = 0


@dataclass(frozen=True)
class Rank:
    """What the leaderboard is ordered by. `mode` null: as the metric has it."""

    metric: str = "fid"
    mode: Literal["min", "max"] | None = None

    @property
    def by(self) -> Metric:
        """The metric, in the direction that is asked for."""
        metric = METRICS[self.metric]
        return replace(metric, larger_is_better=self.mode == "max") if self.mode else metric


@dataclass(frozen=True)
class EarlyStop:
    """Asynchronous successive halving (ASHA): at `first` steps, and at every `factor` times as many, a trial
    goes on if its NLL bound on `nll_images` test images is among the best 1/factor so far. Null: never."""

    first: CountOrNull = None
    factor: Annotated[int, Range(ge=2)] = 3
    nll_images: Count = 32

    def rungs(self, steps: int) -> list[int]:
        """Return the steps at which a trial of so many is judged."""
        rungs, rung = [], self.first or steps
        while rung < steps:
            rungs.append(rung)
            rung *= self.factor
        return rungs


@dataclass(frozen=True)
class Limits:
    """No trial is started after `hours` of one command, and none beyond the first `trials`. Null: no limit."""

    hours: Annotated[float | None, Range(gt=0)] = None
    trials: CountOrNull = None


@dataclass(frozen=True)
class Interval:
    """Values from `low` to `high`, whole numbers where both are."""

    low: int | float
    high: int | float
    scale: Literal["linear", "log"] = "linear"

    def at(self, u: float) -> int | float:
        """Return the value at u in [0, 1), of six digits."""
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
class Settings:
    """What a sweep file says besides its space. seeds: of each point, () = the experiment's own; concurrent: trials
    at once, null = as many as fit."""

    name: str
    experiments: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    concurrent: CountOrNull = None
    draw: Draw = field(default_factory=Draw)
    rank: Rank = field(default_factory=Rank)
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    budget: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Sweep(Settings):
    """A sweep. space: key -> the values it takes, or an Interval; overrides: key -> the value it has in all trials;
    note: what a reader has to know before any number."""

    space: dict[str, list[Value] | Interval] = field(default_factory=dict)
    overrides: Values = field(default_factory=dict)
    note: str = ""

    @property
    def size(self) -> int:
        """How many trials there are; costs nothing."""
        lengths = [len(values) for values in self.space.values() if isinstance(values, list)]
        counts = {"grid": math.prod(lengths), "one_at_a_time": 1 + sum(lengths) - len(lengths)}
        drawn = counts.get(self.draw.method, self.draw.points or 0)
        count = len(self.experiments) * drawn * max(1, len(self.seeds))
        return min(count, self.budget.trials or count)

    def find_problems(self) -> Problems:
        """Find what only several values together show."""
        found: Problems = []
        method = self.draw.method
        lists = method in ("grid", "one_at_a_time")  # their values decide how many points there are
        if not re.fullmatch(FILE_NAME, self.name):
            found.append(
                ("name", f"is {self.name!r}; it names a folder: letters, digits, '.', '_' and '-' only")
            )
        for key, names in (("experiments", self.experiments), ("seeds", self.seeds)):
            if len(set(names)) < len(names):
                found.append((key, f"is {list(names)}; each may stand there once"))
        if lists and self.draw.points:
            found.append(("draw.points", f"is for random and sobol; {method} has as many as it has"))
        if not lists and not self.draw.points:
            found.append(("draw.points", f"is null; draw.method={method} needs a number of at least 1"))
        if not self.space and (not lists or (len(self.experiments) == 1 and not self.seeds)):
            found.append(("space", f"is empty, and draw.method={method} draws from it"))
        for key, values in self.space.items():
            where = f"space.{key}"
            if key in self.overrides:
                found.append((where, "is overridden too; say one of the two"))
            if key in ("name", "seed"):
                found.append(
                    (where, "cannot be swept: trials are named by their values, and seeds have a key")
                )
            if isinstance(values, Interval):
                if lists:
                    found.append(
                        (where, f"is a range, which {method} cannot have: list values, or draw.method=sobol")
                    )
                if values.low >= values.high:
                    found.append((where, f"is empty: low={values.low} is not below high={values.high}"))
                if values.scale == "log" and values.low <= 0:
                    found.append((where, f"begins at {values.low}; a log scale begins above 0"))
            elif len(set(map(json.dumps, values))) < len(values):
                found.append((where, f"is {json.dumps(values)}; each value may stand there once"))
        if self.early_stop.first and "train.steps" in self.space:
            found.append(("space.train.steps", "is swept, and early_stop compares trials at equal steps"))
        return found


def load_sweep(name: str, overrides: list[str]) -> Sweep:
    """Read conf/sweep/, override, check; `overrides` without their `sweep.`. Raises ConfigError with every fault
    that the file alone shows."""
    path = find_file(name, "sweep")
    tree: Tree = {"name": path.stem, **apply_overrides(read_file(path), overrides)}
    tree.pop("note", None)  # the sweep.yaml that a study leaves can be run again
    shared = flatten(tree.pop("overrides", None) or {})
    space, faults = _read_space(tree.pop("space", None) or {})
    given = {key: value for key, value in tree.items() if value is not None}
    if ("experiment" in given) == ("experiments" in given):
        faults["experiment"] = "(a name) or experiments (a list of names): one of the two is needed"
    given["experiments"] = given.pop("experiment", given.get("experiments", []))
    values, wrong = check_values({"sweep": Settings}, {"sweep": given}, complete=False)
    wrong = {key.removeprefix("sweep."): fault for key, fault in wrong.items()}
    wrong |= check_names(given, {"rank.metric": METRICS})
    faults |= wrong
    if not wrong:
        sweep = Sweep(**vars(values["sweep"]), space=space, overrides=shared)
        faults |= dict(sweep.find_problems())
    if faults:
        raise ConfigError([f"{path.name}: {key} {fault}" for key, fault in faults.items()])
    return sweep


def _read_space(tree: Tree) -> tuple[dict[str, list[Value] | Interval], Faults]:
    """Return what each key of the space takes, and what is wrong with it."""
    space: dict[str, list[Value] | Interval] = {}
    faults: Faults = {}
    if not isinstance(tree, dict):
        return {}, {"space": f"is {tree!r}; it is a section of keys with their values"}
    for key, values in tree.items():
        where = f"space.{key}"
        if isinstance(values, dict):
            found, wrong = check_values({where: Interval}, {where: values}, complete=False)
            faults |= wrong
            if not wrong:
                space[key] = found[where]
        elif isinstance(values, list) and values:
            space[key] = values
        else:
            faults[where] = f"is {values!r}; it takes a list of values, or low, high and scale"
    return space, faults
