"""The report stage: report.html and report.md from the files of a run. It needs neither network nor GPU.

Whatever is not there yet is left out, with the command that makes it. The report is made again exactly when a
file that it shows has changed.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline import config
from pipeline.compute.work import Unit
from pipeline.config import Experiment
from pipeline.errors import PipelineError
from pipeline.report import beside_paper, likelihood, made, pictures, scores, training
from pipeline.report.markdown import to_markdown
from pipeline.report.page import HTML, MARKDOWN, Cards, Code, Page, Section
from pipeline.report.source import Source
from pipeline.report.web import to_html
from pipeline.store.files import atomic_directory, read_manifest, write_manifest
from pipeline.store.run import Place


def is_done(experiment: Experiment, run: Place) -> bool:
    try:
        manifest = read_manifest(run.report)
    except PipelineError:
        return False
    return manifest is not None and manifest["inputs"] == Source(experiment, run).digest


def work(experiment: Experiment, run: Place) -> Iterator[list[Unit]]:
    """Writes the report in the driver: there is nothing to hand out."""
    source = Source(experiment, run)
    page = compose(source)
    with atomic_directory(run.report) as folder:
        (folder / HTML).write_text(to_html(page), encoding="utf-8")
        (folder / MARKDOWN).write_text(to_markdown(page), encoding="utf-8")
        for picture in page.pictures:
            (folder / picture.name).write_bytes(picture.data)
        names = [HTML, MARKDOWN, *(picture.name for picture in page.pictures)]
        write_manifest(folder, names, inputs=source.digest)
    yield from ()


def compose(source: Source) -> Page:
    e, run = source.experiment, source.run
    sections = [
        Section("Beside the paper", beside_paper.section(source)),
        Section("Scores", scores.section(source)),
        Section("Samples", pictures.section(source)),
        Section("Training", training.section(source)),
        Section("Checkpoints", training.checkpoints(source)),
        Section("Likelihood", likelihood.section(source)),
        Section("Rate and distortion", likelihood.rate_distortion(source)),
        Section("Noise schedule", likelihood.schedule(source)),
        Section("What was run", made.section(source)),
        Section("Data", made.data(source)),
        Section("Configuration", [Code("The resolved experiment", config.to_yaml(e))]),
    ]
    subtitle = f"Denoising diffusion on {e.data.source} · run `{run.run_key}` · data `{run.data_key}`"
    head = [Cards(scores.cards(source))] if source.metrics["scores"] else []
    return Page(e.name, subtitle, scores.verdict(source), head, [s for s in sections if s.blocks])
