"""The trials of a study: each point with the run directory that holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.engine import find
from pipeline.errors import ConfigError
from pipeline.store import keys
from pipeline.store.run import Place, find_runs
from pipeline.sweep.definition import Values
from pipeline.sweep.points import SweepPoint


@dataclass(frozen=True)
class Trial:
    """key: the run key, with a hash of the swept values that it does not hold; what a trial is known by."""

    key: str
    label: str
    swept: Values
    place: Place


def locate_trials(points: list[SweepPoint], root: Path) -> list[Trial]:
    """Find the run of each point. Raises ConfigError where two points would be the same trial."""
    trials: dict[str, Trial] = {}
    known: dict[DataConfig, Place] = {}  # reading a source's fingerprint can take a while
    runs = [path.name for path in find_runs(root)]
    faults = []
    for point in points:
        data = point.experiment.data
        if data not in known:
            known[data] = find.locate_run(point.experiment, root)
        run_key = keys.run_key(point.experiment, known[data].data_key)
        place = replace(known[data], experiment=point.experiment, run_key=run_key)
        names = [name for name in runs if name.endswith(f"-{run_key}")]
        if names and place.name not in names:  # made under another experiment's name: the same numbers
            experiment = replace(point.experiment, name=min(names).removesuffix(f"-{run_key}"))
            place = replace(place, experiment=experiment)
        other = point.other_values
        key = f"{run_key}-{keys.hash_of(other)}" if other else run_key
        if key in trials:
            faults.append(f"'{point.label}' and '{trials[key].label}' are the same trial; leave one out")
        trials[key] = Trial(key, point.label, point.swept, place)
    if faults:
        raise ConfigError(faults)
    return list(trials.values())
