"""The page of one run with its scores in sentences, and the card of its exported weights.

The page names the commands that make missing results.
"""

from pathlib import Path

from pipeline import config
from pipeline.config import Experiment
from pipeline.console import format_duration
from pipeline.report import paper, run_pictures
from pipeline.report.page import TEMPLATE, format_value
from pipeline.report.run_files import REFERENCE_POINTS, RunFiles
from pipeline.scores.metrics import FIRM, HEADLINE, METRICS, Metric
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
        result=describe_run(run),
        comparison_numbers=list_comparison_numbers(run),
        missing_errors=dict.fromkeys(run.scores[key] for key in run.scores if key.endswith("_se_reason")),
        differences="; ".join(list_differences_from_paper(run)),
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


def compare_with_linear_denoiser(run: RunFiles) -> str:
    """Return the numbers of a CIFAR-10 network and of the best linear denoiser, if the network is not better.

    '' otherwise, also where the two cannot be compared. Its RMSE holds for the paper's noise schedule, its rate only
    with the variance fixedlarge.
    """
    d, scores = run.experiment.diffusion, run.scores
    if not (run.is_cifar10 and paper.has_paper_schedule(d) and "rmse" in scores):
        return ""
    names = {"rmse": "RMSE"}
    if run.protocol.get("nll_variance", d.variance) == "fixedlarge":
        names = {"rate_bpd": "rate", **names}
    if all(scores[key] < paper.LMMSE[key] for key in names):
        return ""
    ours, line = (
        ", ".join(f"{name}{FIRM}{values[key]:.4f}" for key, name in names.items())
        for values in (scores, paper.LMMSE)
    )
    return f"{ours}, against {line}"


def describe_run(run: RunFiles) -> str:
    """Describe the result of a run as Markdown: its steps, its scores, and a warning if the network is useless."""
    after = f"After {run.step:,} training steps: " if run.step and run.experiment.is_trained else ""
    if not run.scores:
        return f"{after}not scored yet." if after else "Not trained yet."
    warning = ""
    if linear := compare_with_linear_denoiser(run):
        warning = (
            "**Not yet useful**: it does not beat the best linear denoiser, which needs no training "
            f"({linear}). "
        )
    return f"{warning}{after}{describe_scores(run)}."


def describe_scores(run: RunFiles) -> str:
    """Return the scores as a sentence, with the paper's scores or those of real images."""
    scores, parts = run.scores, []
    metrics = [m for m in (*HEADLINE, METRICS["train_nll_bpd"]) if m.name in scores]
    for metric in metrics:
        parts.append(f"{metric.heading}{FIRM}{metric.format_score(scores)} {metric.unit}".rstrip())
    if run.is_comparable:
        printed = run.paper_row.scores if run.paper_row else {}
        beside = [f"{m.heading} {printed[m.name]}" for m in metrics if m.name in printed]
        tail = ", ".join(beside).replace(" ", FIRM) or "which prints no score for this objective"
        return f"{', '.join(parts)}, by the paper's protocol ({tail})"
    if "fid" in scores and (real := compare_with_real_images(run, METRICS["fid"])):
        parts[0] += f" ({real})"
    reason = ". Not comparable with the paper's row" if run.is_cifar10 else ""
    return ", ".join(parts) + reason


def compare_with_real_images(run: RunFiles, metric: Metric) -> str:
    """Compare the score of the samples with that of as many unseen real images; '' without one."""
    points = run.metrics["reference_points"]
    name = next((name for name in ("test", "train") if metric.name in points.get(name, {})), "")
    if not name:
        return ""
    real, own = points[name], points.get("samples", {})
    text = f"{REFERENCE_POINTS[name].lower()} {metric.format_score(real)}".replace(" ", FIRM)
    if real["n"] == run.protocol.get("n"):
        return f"{text} at equal n"
    if metric.name in own and own["n"] == real["n"]:
        return f"at n = {real['n']:,}: this run {metric.format_score(own)}, {text}"
    return f"{text} at n = {real['n']:,}"


def list_comparison_numbers(run: RunFiles) -> dict[str, str]:
    """Return for each headline score the numbers to compare it with."""
    printed = run.paper_row.scores if run.paper_row else {}
    notes = {}
    for metric in HEADLINE:
        parts = [f"paper {printed[metric.name]}"] if metric.name in printed else []
        parts += filter(None, [compare_with_real_images(run, metric)])
        notes[metric.name] = " · ".join(parts) or "upper bound, test images"
    return notes


def list_differences_from_paper(run: RunFiles) -> list[str]:
    """List the settings that differ from the paper's, with both values; the objective is not compared."""
    tree, found = config.to_dict(run.experiment), []
    for name, recipe in paper.RECIPE.items():
        if name == "train" and not run.experiment.is_trained:
            continue
        ours = tree[name] if tree[name].get("name") == recipe.get("name") else {"name": tree[name]["name"]}
        found += [
            f"`{name}.{key}` is {format_value(ours[key])}, not {format_value(value)}"
            for key, value in recipe.items()
            if key in ours and ours[key] != value
        ]
    return found


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
