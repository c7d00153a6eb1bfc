"""The model card of exported weights: a README.md as the Hugging Face Hub reads it."""

from pathlib import Path

from pipeline.config import Experiment
from pipeline.report.page import TEMPLATE
from pipeline.report.run_files import RunFiles
from pipeline.report.run_pictures import copy_picture
from pipeline.store.files import write_text
from pipeline.store.run import locate_without_data
from pipeline.store.selection import fill_in_selection


def write_card(folder: Path, experiment: Experiment, source: str, path: Path | None = None) -> None:
    """Write README.md into an exported folder, with samples and scores if the run at `path` has its own."""
    place = locate_without_data(path, experiment) if path and not experiment.find_missing_files() else None
    found = place and fill_in_selection(place)  # None before the best checkpoint is known
    run = RunFiles(found) if found else None
    how = run.protocol if run else {}
    if path and source != f"{how.get('weights')} weights of step {how.get('checkpoint')} of {path.name}":
        run = None  # its scores are of other weights
    if run and "grid" in run.paths:
        copy_picture(run.paths["grid"], folder, "")
    card = TEMPLATE.get_template("card.md").render(experiment=experiment, source=source, run=run)
    write_text(folder / "README.md", card)
