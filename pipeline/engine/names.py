"""The names that configurations may use, from their registries. None of these imports torch."""

from __future__ import annotations

from collections.abc import Iterable


def list_known_names() -> dict[str, Iterable[str]]:
    from pipeline.data.sources import SOURCES
    from pipeline.scores.metrics import FAMILIES
    from pipeline.stages.figures import FIGURES

    return {"data.source": SOURCES, "evaluate.metrics": FAMILIES, "figures.which": FIGURES}
