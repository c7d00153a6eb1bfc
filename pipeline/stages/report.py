"""The report stage: a page from the files of a run. It needs neither network nor GPU.

The report is made again exactly when a file that it shows has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from pipeline.compute.work import Unit
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.report.page import write_page
from pipeline.report.run import write_markdown
from pipeline.report.source import Source
from pipeline.stages.stage import Stage
from pipeline.store.files import read_manifest
from pipeline.store.run import Place


def is_done(experiment: Experiment, run: Place) -> bool:
    try:
        manifest = read_manifest(run.report)
    except PipelineError:
        return False
    return manifest is not None and manifest["inputs"] == Source(run.of(experiment)).digest


def work(experiment: Experiment, run: Place) -> Iterator[list[Unit]]:
    """Writes the report in the driver: there is nothing to hand out."""
    source = Source(run.of(experiment))
    write_page(run.report, partial(write_markdown, source), inputs=source.digest)
    yield from ()


class ReportStage(Stage):
    """Writes the page of a run."""

    name = "report"
    chosen = True
    shows_others = True

    def needs(self, experiment: Experiment) -> tuple[str, ...]:
        return ("evaluate", "figures")

    def is_done(self, place: Place) -> bool:
        return is_done(place.experiment, place)

    def work(self, place: Place) -> Iterator[list[Unit]]:
        return work(place.experiment, place)


STAGE = ReportStage()
