"""Reading an experiment whose names (data sources, metrics, figures) are checked by the registries of their owners."""

from __future__ import annotations

from pipeline import config
from pipeline.config import Experiment
from pipeline.errors import ConfigError


def load_experiment(name: str, overrides: list[str]) -> Experiment:
    """Read, override, check. Raises ConfigError with every fault."""
    from pipeline.data.sources import SOURCES
    from pipeline.scores.metrics import FAMILIES

    experiment = config.load_experiment(
        name, overrides, {"data.source": SOURCES, "evaluate.metrics": FAMILIES}
    )
    from pipeline.stages.figures.stage import FIGURES  # imports torch: only once all else is right

    if faults := config.check_names(config.to_dict(experiment), {"figures.which": FIGURES}):
        raise ConfigError([f"{key} {fault}" for key, fault in faults.items()])
    return experiment
