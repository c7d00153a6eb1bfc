"""The page of one run, which names the commands that make missing results, and the card of its exported weights."""

from pathlib import Path

from pipeline import config
from pipeline.config import Experiment
from pipeline.console import format_duration
from pipeline.report import headline, run_pictures
from pipeline.report.page import TEMPLATE, format_value
from pipeline.report.run_files import RunFiles
from pipeline.store.checkpoint import create_network
from pipeline.store.files import write_text
from pipeline.store.log import describe_slow_rank
from pipeline.store.run import STAGES, Place
from pipeline.store.selection import fill_in_selection
from pipeline.tracking import list_links


def compose_page(run: RunFiles, folder: Path) -> str:
    """Return the page as Markdown; write its pictures into `folder`."""
    links = [f"[{link.partition('/#')[0]}]({link}){served}" for link, served in list_links(run.place)]
    return TEMPLATE.get_template("run.md").render(
        run=run,
        links=links,
        folder=folder,
        headline=headline,
        pictures=run_pictures,
        slow_rank=describe_slow_rank(run.points),
        provenance=describe_provenance(run),
        configuration=config.to_yaml(run.experiment).rstrip(),
    )


def describe_provenance(run: RunFiles) -> dict[str, str]:
    """Describe what made the run: network, commits, hardware, versions and time; '' for each that is unknown."""
    count = sum(tensor.numel() for tensor in create_network(run.experiment, "meta").parameters())
    stages: dict[str, list[str]] = {}  # by commit
    for stage in STAGES:
        for commit in run.commits_by_stage.get(stage, []):
            stages.setdefault(commit, []).append(stage)
    commits = [f"{', '.join(names)} `{commit}`" for commit, names in stages.items()]
    if len(stages) < 2:  # the commit alone if all stages have the same
        commits = [f"`{commit}`" for commit in stages or [run.provenance.get("commit")] if commit]
    hardware, seconds = run.provenance.get("hardware"), run.seconds_by_stage
    times = [f"{stage} {format_duration(seconds[stage])}" for stage in STAGES if stage in seconds]
    if len(times) > 1:
        times.append(f"**{format_duration(sum(seconds.values()))} in all**")
    return {
        "Network": f"{format_value(run.experiment.model.name)}, {count:,} parameters",
        "Commit": " · ".join(commits),
        "Hardware": format_value(hardware) if hardware else "",
        "Versions": ", ".join(map(" ".join, (run.provenance.get("versions") or {}).items())),
        "Time": " · ".join(times),
    }


def write_card(folder: Path, experiment: Experiment, source: str, place: Place | None = None) -> None:
    """Write the model card of exported weights into their folder: a README.md as the Hugging Face Hub reads it.

    It has the run's samples and scores if they are of these weights. experiment: with these weights as those that are
    sampled.
    """
    readable = None if experiment.find_missing_files() else place
    found = readable and fill_in_selection(readable)  # None before the best checkpoint is known
    run = RunFiles(found) if found else None
    scored = [run.protocol.get(key) for key in ("weights", "checkpoint")] if run else []
    if scored != [experiment.weights_kind, experiment.checkpoint_step]:
        run = None
    if run and "grid" in run.paths:
        run_pictures.copy_picture(run.paths["grid"], folder, "")
    card = TEMPLATE.get_template("card.md").render(experiment=experiment, source=source, run=run)
    write_text(folder / "README.md", card)
