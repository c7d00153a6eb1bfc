"""The trials of a sweep: its space, drawn, and every point of it as an experiment."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import Experiment, load_experiment, relative_paths
from pipeline.engine.names import known_names
from pipeline.errors import ConfigError
from pipeline.scores.metrics import LOSS
from pipeline.scores.ranking import describe_objective, name_values
from pipeline.store.keys import run_content
from pipeline.sweep.definition import Draw, Range, Sweep


@dataclass(frozen=True)
class Point:
    """One trial's place in the sweep: swept = key -> value for what differs, in the order of the file."""

    label: str
    swept: dict[str, Any]
    experiment: Experiment

    @property
    def beside_run_key(self) -> dict[str, Any]:
        """The swept values that make no other run, only other samples or scores of it."""
        content = {**run_content(self.experiment), "data": None, "experiment": None}

        def names_a_run(key: str) -> bool:
            section, _, inner = key.partition(".")
            values = content.get(section)
            return section in content and (not isinstance(values, dict) or inner in values)

        return {key: value for key, value in self.swept.items() if not names_a_run(key)}


def points(sweep: Sweep, overrides: list[str]) -> list[Point]:
    """Every trial, in the order of the file; `overrides` are key=value for all of them.

    Raises ConfigError with every fault of every experiment, each once.
    """
    swept_by_hand = [word for word in overrides if word.partition("=")[0] in sweep.space]
    if swept_by_hand:
        raise ConfigError(f"{swept_by_hand[0]}: {sweep.name} sweeps this key; change the file, or copy it")
    common, known = _common(sweep, overrides), known_names()
    found: list[Point] = []
    faults: dict[str, None] = {}  # a set that keeps its order
    for swept in itertools.islice(_combinations(sweep), sweep.size):
        own = [f"{key}={json.dumps(value)}" for key, value in swept.items() if key != "experiment"]
        try:
            experiment = load_experiment(swept.get("experiment", sweep.experiments[0]), common + own, known)
            found.append(Point(name_values(swept), swept, experiment))
        except ConfigError as error:
            faults |= dict.fromkeys(error.problems)
    faults |= dict.fromkeys(_incomparable(sweep, found))
    if faults:
        raise ConfigError(list(faults))
    return found


def relative_paths_of_sweep(sweep: Sweep, overrides: list[str]) -> list[str]:
    """The paths of a valid sweep that depend on the folder or the person, as 'data.path=images', each once."""
    common = _common(sweep, overrides)
    return list(dict.fromkeys(path for name in sweep.experiments for path in relative_paths(name, common)))


def _common(sweep: Sweep, overrides: list[str]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in sweep.overrides.items()] + overrides


def _combinations(sweep: Sweep) -> Iterator[dict[str, Any]]:
    experiments = [{"experiment": name} for name in sweep.experiments] if len(sweep.experiments) > 1 else [{}]
    seeds = [{"seed": seed} for seed in sweep.seeds] or [{}]
    for experiment, values, seed in itertools.product(experiments, list(_drawn(sweep)), seeds):
        yield {**experiment, **values, **seed}


def _drawn(sweep: Sweep) -> Iterator[dict[str, Any]]:
    lists = {key: values for key, values in sweep.space.items() if isinstance(values, list)}
    if sweep.draw.method == "grid":
        yield from (dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))
        return
    if sweep.draw.method == "one_at_a_time":
        first = {key: values[0] for key, values in lists.items()}
        yield first
        yield from ({**first, key: value} for key, values in lists.items() for value in values[1:])
        return
    seen = set()
    for row in _unit_cube(sweep.draw, len(sweep.space)):
        point = {
            key: values.at(u) if isinstance(values, Range) else values[int(u * len(values))]
            for (key, values), u in zip(sweep.space.items(), row, strict=True)
        }
        text = json.dumps(point)
        if text not in seen:  # lists have few values, and two draws may meet
            seen.add(text)
            yield point


def _unit_cube(draw: Draw, dimensions: int) -> list[list[float]]:
    """The first points of a sequence in [0, 1)^dimensions: more of them begin with the same."""
    count = draw.points or 0
    if draw.method == "random":
        return np.random.default_rng(draw.seed).random((count, dimensions)).tolist()
    import torch  # not before it is needed: a wrong sweep is told of at once

    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=draw.seed)
    return engine.draw(count, dtype=torch.float64).clamp(max=1 - 1e-9).tolist()


def _incomparable(sweep: Sweep, found: list[Point]) -> list[str]:
    """Why the trials cannot be ranked, or stopped, as the sweep says."""
    faults = []
    metric = sweep.rank.by
    if metric.name == LOSS.name:
        if len({json.dumps(describe_objective(point.experiment)) for point in found}) > 1:
            keys = [key for key in sweep.space if key.startswith("diffusion.")] or [
                "the experiments' diffusion"
            ]
            faults.append(
                f"rank.metric={LOSS.name}: losses are not comparable over {', '.join(keys)}; rank by nll_bpd or fid"
            )
    elif found and not any(metric.family in (None, *point.experiment.evaluate.metrics) for point in found):
        asked = ", ".join(found[0].experiment.evaluate.metrics)
        faults.append(
            f"rank.metric={metric.name} is reported by no trial: evaluate.metrics is [{asked}]; "
            f"add {metric.family} to it"
        )
    if sweep.early_stop.first:
        if any(point.experiment.train.lr_decay != "none" for point in found):
            faults.append(
                "early_stop needs train.lr_decay=none: a rate that decays over the steps makes other runs"
            )
        if any(not sweep.early_stop.rungs(point.experiment.train.steps) for point in found):
            first = sweep.early_stop.first
            faults.append(f"early_stop.first={first} is not below train.steps: nothing would be stopped")
    return faults
