"""A sweep: which experiments, over which values of their keys, how many at once, ranked by what."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ddpm.config import Problems
from pipeline.config import find, suggestion
from pipeline.config.files import override, read_file
from pipeline.config.load import read_section
from pipeline.errors import ConfigError
from pipeline.scores.metrics import METRICS, Metric


@dataclass(frozen=True)
class Draw:
    """How points are taken from the space: every combination (grid), every value of one key with the first ones of
    all others (one_at_a_time), or `points` of them, at random or by a Sobol sequence, which fills the space evenly.
    More points keep those that are there."""

    method: Literal["grid", "one_at_a_time", "random", "sobol"] = "grid"
    points: int | None = None
    seed: int = 0

    @property
    def takes_lists(self) -> bool:
        """Whether the values that are listed decide how many points there are."""
        return self.method in ("grid", "one_at_a_time")

    def problems(self) -> Problems:
        if self.takes_lists:
            return (
                [("points", f"is for random and sobol; {self.method} has as many as it has")]
                if self.points
                else []
            )
        if self.points is None or self.points < 1:
            return [("points", f"is {self.points}; draw.method={self.method} needs a number of at least 1")]
        return []


@dataclass(frozen=True)
class Rank:
    """What the leaderboard is ordered by. `mode` null: as the metric has it."""

    metric: str = "fid"
    mode: Literal["min", "max"] | None = None

    def problems(self) -> Problems:
        if self.metric in METRICS:
            return []
        hint, known = suggestion(self.metric, METRICS), ", ".join(METRICS)
        return [("metric", f"is '{self.metric}'{hint}, which no trial reports; known: {known}")]

    @property
    def by(self) -> Metric:
        """The metric, in the direction that is asked for."""
        metric = METRICS[self.metric]
        return replace(metric, larger_is_better=self.mode == "max") if self.mode else metric


@dataclass(frozen=True)
class EarlyStop:
    """Asynchronous successive halving (ASHA): at `first` steps, and at every `factor` times as many, a trial
    goes on if its NLL bound on `nll_images` test images is among the best 1/factor so far. Null: never."""

    first: int | None = None
    factor: int = 3
    nll_images: int = 32

    def problems(self) -> Problems:
        return [
            (key, f"is {value}; it must be at least {least}")
            for key, value, least in (
                ("first", self.first, 1), ("factor", self.factor, 2), ("nll_images", self.nll_images, 1),
            )
            if value is not None and value < least
        ]  # fmt: skip

    def rungs(self, steps: int) -> list[int]:
        """The steps at which a trial of so many is judged."""
        found, rung = [], self.first or steps
        while rung < steps:
            found.append(rung)
            rung *= self.factor
        return found


@dataclass(frozen=True)
class Budget:
    """No trial is started after `hours` of one command, and none beyond the first `trials`. Null: no limit."""

    hours: float | None = None
    trials: int | None = None

    def problems(self) -> Problems:
        return [
            (key, f"is {value}; it must be above 0")
            for key, value in (("hours", self.hours), ("trials", self.trials))
            if value is not None and value <= 0
        ]


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high`, whole numbers where both are."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"

    def at(self, u: float) -> float | int:
        """The value at u in [0, 1), of six digits."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            top = self.high + 1
            value = (
                self.low * (top / self.low) ** u if self.scale == "log" else self.low + u * (top - self.low)
            )
            return min(int(value), self.high)
        low, high = (
            (math.log(self.low), math.log(self.high)) if self.scale == "log" else (self.low, self.high)
        )
        value = low + u * (high - low)
        return float(f"{math.exp(value) if self.scale == 'log' else value:.6g}")


@dataclass(frozen=True)
class Sweep:
    """A study. space: key -> the values it takes, or a Range; overrides: key -> the value it has in all trials;
    seeds: of each point, () = the experiment's own; concurrent: trials at once, null = as many as fit."""

    name: str
    experiments: tuple[str, ...]
    space: dict[str, list[Any] | Range]
    overrides: dict[str, Any]
    seeds: tuple[int, ...]
    concurrent: int | None
    draw: Draw = field(default_factory=Draw)
    rank: Rank = field(default_factory=Rank)
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    budget: Budget = field(default_factory=Budget)

    @property
    def size(self) -> int:
        """How many trials there are; costs nothing."""
        lengths = [len(values) for values in self.space.values() if isinstance(values, list)]
        drawn = {"grid": math.prod(lengths), "one_at_a_time": 1 + sum(lengths) - len(lengths)}.get(
            self.draw.method, self.draw.points or 0
        )
        count = len(self.experiments) * drawn * max(1, len(self.seeds))
        return min(count, self.budget.trials or count)


# From a file to the dataclass

SECTIONS: dict[str, type] = {"draw": Draw, "rank": Rank, "early_stop": EarlyStop, "budget": Budget}
TOP = ("name", "experiment", "experiments", "space", "overrides", "seeds", "concurrent")


def load_sweep(name: str, overrides: list[str]) -> Sweep:
    """Read conf/sweep/, override, check; `overrides` without their `sweep.`. Raises ConfigError with every fault
    that the file alone shows."""
    path = find(name, "sweep")
    tree = override(read_file(path), overrides)
    faults = [
        f"{key} is unknown in a sweep{suggestion(str(key), (*TOP, *SECTIONS))}; known: {', '.join((*TOP, *SECTIONS))}"
        for key in tree
        if key not in TOP and key not in SECTIONS
    ]
    sections: dict[str, Any] = {
        key: read_section(cls, tree.get(key) or {}, key, faults) for key, cls in SECTIONS.items()
    }
    for key, section in sections.items():
        faults += [f"{key}.{inner} {message}" for inner, message in (section.problems() if section else [])]
    sweep = Sweep(
        name=str(tree.get("name", path.stem)),
        experiments=_experiments(tree, faults),
        space=_space(tree.get("space") or {}, faults),
        overrides=_flat(tree.get("overrides") or {}),
        seeds=_seeds(tree.get("seeds"), faults),
        concurrent=tree.get("concurrent"),
        **{key: section or SECTIONS[key]() for key, section in sections.items()},
    )
    faults += _contradictions(sweep)
    if faults:
        raise ConfigError([f"{path.name}: {fault}" for fault in faults])
    return sweep


def _experiments(tree: dict[str, Any], faults: list[str]) -> tuple[str, ...]:
    one, several = tree.get("experiment"), tree.get("experiments")
    if (one is None) == (several is None):
        faults.append("experiment (a name) or experiments (a list of names): one of the two is needed")
        return ()
    names = [one] if several is None else several
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        faults.append(f"experiments is {names!r}; a list of names is expected")
        return ()
    faults += [f"experiments names {name} twice" for name in sorted(set(names)) if names.count(name) > 1]
    return tuple(names)


def _space(tree: Any, faults: list[str]) -> dict[str, list[Any] | Range]:
    if not isinstance(tree, dict):
        faults.append(f"space is {tree!r}; it is a section of keys with their values")
        return {}
    space: dict[str, list[Any] | Range] = {}
    for key, values in tree.items():
        where = f"space.{key}"
        if isinstance(values, dict):
            found = read_section(Range, values, where, faults)
            if found is not None:
                # The dataclass makes floats of them, and whole numbers mean whole numbers.
                space[key] = Range(values["low"], values["high"], found.scale)
                faults += _range_faults(where, space[key])
        elif not isinstance(values, list) or not values:
            faults.append(f"{where} is {values!r}; it takes a list of values, or low, high and scale")
        else:
            texts = [json.dumps(value) for value in values]
            faults += [f"{where} names {text} twice" for text in sorted(set(texts)) if texts.count(text) > 1]
            space[key] = values
    return space


def _range_faults(where: str, found: Any) -> list[str]:
    faults = (
        []
        if found.low < found.high
        else [f"{where} is empty: low={found.low} is not below high={found.high}"]
    )
    if found.scale == "log" and found.low <= 0:
        faults.append(f"{where}.low is {found.low}; a log scale begins above 0")
    return faults


def _seeds(value: Any, faults: list[str]) -> tuple[int, ...]:
    seeds = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        faults.append(f"seeds is {value!r}; a list of different whole numbers is expected")
        return ()
    return tuple(seeds)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _contradictions(sweep: Sweep) -> list[str]:
    """What only several keys together show."""
    faults = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", sweep.name):
        faults.append(f"name is {sweep.name!r}; it names a folder: letters, digits, '.', '_' and '-' only")
    if sweep.concurrent is not None and (type(sweep.concurrent) is not int or sweep.concurrent < 1):
        faults.append(f"concurrent is {sweep.concurrent!r}; null or a number of at least 1 is expected")
    faults += [
        f"{key} is swept and overridden; say one of the two" for key in sweep.space if key in sweep.overrides
    ]
    faults += [
        f"{key} cannot be swept: {reason}"
        for key, reason in {"name": "trials are named by their values", "seed": "say seeds"}.items()
        if key in sweep.space
    ]
    if sweep.experiments and len(sweep.experiments) == 1 and not sweep.space and not sweep.seeds:
        faults.append("the space is empty: give space, several experiments or seeds")
    ranges = [key for key, values in sweep.space.items() if isinstance(values, Range)]
    if ranges and sweep.draw.takes_lists:
        faults.append(
            f"space.{ranges[0]} is a range, which a {sweep.draw.method} cannot have: list values, or draw.method=sobol"
        )
    if not sweep.draw.takes_lists and not sweep.space:
        faults.append(f"draw.method={sweep.draw.method} has no space to draw from")
    if sweep.early_stop.first and "train.steps" in sweep.space:
        faults.append(
            "train.steps is swept, and early_stop compares trials at equal steps; say one of the two"
        )
    return faults
