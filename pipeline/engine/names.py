"""The names that configurations may use, from the registries of their owners. None of them imports torch."""

from __future__ import annotations

from collections.abc import Iterable


def list_known_names() -> dict[str, Iterable[str]]:
    """Return what each key that holds names may hold, for the reader of configurations."""
    from pipeline.data.sources import SOURCES
    from pipeline.scores.metrics import FAMILIES
    from pipeline.stages.figures.stage import FIGURES

    return {"data.source": SOURCES, "evaluate.metrics": FAMILIES, "figures.which": FIGURES}
