"""The report stage: a page from the files of a run. It needs neither network nor GPU.

The report is made again exactly when a file that it shows has changed.
"""

from collections.abc import Iterator
from functools import partial

from pipeline.compute.units import Unit
from pipeline.config import Experiment
from pipeline.report.page import write_page
from pipeline.report.run_files import RunFiles
from pipeline.report.run_page import compose_page, describe_run
from pipeline.stages.stage import Stage
from pipeline.store.files import PageManifest, read_manifest, try_read
from pipeline.store.run import Place


class ReportStage(Stage):
    name = "report"
    uses_checkpoint = True
    shows_other_stages = True

    def list_required_stages(self, experiment: Experiment) -> tuple[str, ...]:
        return ("evaluate", "figures")

    def is_done(self, place: Place) -> bool:
        manifest = try_read(read_manifest, place.report, PageManifest)
        return manifest is not None and manifest.get("inputs") == RunFiles(place).content_hash

    def work(self, place: Place) -> Iterator[list[Unit]]:
        run = RunFiles(place)
        write_page(
            place.report, partial(compose_page, run), inputs=run.content_hash, verdict=describe_run(run)
        )
        yield from ()


STAGE = ReportStage()
