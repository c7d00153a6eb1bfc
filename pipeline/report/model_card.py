"""The model card of exported weights: a README.md as the Hugging Face Hub reads it."""

from pathlib import Path

from pipeline.config import Experiment
from pipeline.report.page import TEMPLATE
from pipeline.report.run_files import RunFiles
from pipeline.report.run_pictures import copy_picture
from pipeline.store.files import write_text
from pipeline.store.run import Place
from pipeline.store.selection import fill_in_selection


def write_card(folder: Path, experiment: Experiment, source: str, place: Place | None = None) -> None:
    """Write README.md into an exported folder, with the run's samples and scores if they are of these weights.

    experiment: with the exported weights as those that are sampled.
    """
    readable = None if experiment.find_missing_files() else place
    found = readable and fill_in_selection(readable)  # None before the best checkpoint is known
    run = RunFiles(found) if found else None
    scored = [run.protocol.get(key) for key in ("weights", "checkpoint")] if run else []
    if scored != [experiment.weights_kind, experiment.checkpoint_step]:
        run = None
    if run and "grid" in run.paths:
        copy_picture(run.paths["grid"], folder, "")
    card = TEMPLATE.get_template("card.md").render(experiment=experiment, source=source, run=run)
    write_text(folder / "README.md", card)
