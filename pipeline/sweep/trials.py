"""The trials of a sweep: each point with the run directory that holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Experiment
from pipeline.engine import execute as stages
from pipeline.errors import ConfigError
from pipeline.store import keys
from pipeline.store.run import Place
from pipeline.sweep.points import Point


@dataclass(frozen=True)
class Trial:
    """key: the run key, with a hash of the swept values that it does not hold; what a trial is known by."""

    key: str
    point: Point
    run: Place

    @property
    def label(self) -> str:
        return self.point.label

    @property
    def experiment(self) -> Experiment:
        return self.point.experiment


def locate(points: list[Point], root: Path) -> list[Trial]:
    """Raises ConfigError where two points would be the same trial."""
    found: dict[str, Trial] = {}
    known: dict[Any, Place] = {}  # reading a source's fingerprint can take a while
    faults = []
    for point in points:
        data = point.experiment.data
        if data not in known:
            known[data] = stages.locate(point.experiment, root)
        trial = _trial(point, known[data])
        if trial.key in found:
            faults.append(f"'{point.label}' and '{found[trial.key].label}' are the same trial; leave one out")
        found[trial.key] = trial
    if faults:
        raise ConfigError(faults)
    return list(found.values())


def _trial(point: Point, same_data: Place) -> Trial:
    key = keys.run_key(point.experiment, same_data.data_key)
    run = replace(same_data, experiment=point.experiment, run_key=key)
    elsewhere = [path.parent.name for path in run.storage.glob(f"*-{key}/experiment.yaml")]
    if elsewhere and run.path.name not in elsewhere:  # made under another experiment's name: the same numbers
        name = min(elsewhere).removesuffix(f"-{key}")
        run = replace(run, experiment=replace(point.experiment, name=name))
    beside = point.beside_run_key
    return Trial(f"{key}-{keys.hash_of(beside)}" if beside else key, point, run)
