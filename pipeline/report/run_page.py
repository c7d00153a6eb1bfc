"""The page of one run. What is not there yet is left out, with the command that makes it."""

from pathlib import Path

from pipeline import config
from pipeline.report import costs, headline, paper, pictures, run_charts
from pipeline.report.page import TEMPLATE
from pipeline.report.run_files import RunFiles
from pipeline.scores.metrics import METRICS
from pipeline.store.checkpoint import create_network
from pipeline.store.run import STAGES


def compose_page(run: RunFiles, folder: Path) -> str:
    """Return the page as Markdown; write its pictures into `folder`."""
    experiment, bound, selection = run.experiment, run.bound, run.read_content("selection")
    figures = pictures.copy_figures(run, folder)
    table_4 = paper.TABLE_4 if run.is_cifar10 and paper.has_paper_schedule(experiment.diffusion) else {}
    checkpoints, ladder, chart = {}, {}, None
    if selection:
        metric = METRICS[selection["metric"]]
        ladder = paper.LADDER if run.is_cifar10 and metric.name == "fid" else {}
        checkpoints = {row["step"]: row[metric.name] for row in selection["scores"]}
        chart = run_charts.draw_checkpoints(checkpoints, selection["best"], metric, ladder, folder)
    last_alpha_bar, schedule = run_charts.draw_schedule(experiment.diffusion, folder)
    shares = run.metrics.get("class_shares")
    return TEMPLATE.get_template("run.md").render(
        run=run,
        STAGES=STAGES,
        linear_denoiser=headline.compare_with_linear_denoiser(run),
        headline=headline.compose_headline(run),
        notes=headline.list_comparison_numbers(run),
        departures="; ".join(headline.list_differences_from_paper(run)),
        skipped=run.read_content("figures").get("skipped", {}),
        samples=figures if "grid" in run.paths else [],
        class_shares=[run_charts.draw_class_shares(shares, folder)] if shares else [],
        curves=run_charts.draw_training(run, folder),
        step_grids=pictures.copy_step_grids(run, folder),
        selection=selection,
        checkpoints=checkpoints,
        ladder=ladder,
        checkpoint_chart=chart,
        terms=run_charts.draw_bound(bound, folder) if bound and "nll_bpd" in run.scores else [],
        table_4=table_4,
        rate_distortion=run_charts.draw_rate_distortion(bound, table_4, folder) if bound else [],
        last_alpha_bar=last_alpha_bar,
        schedule=schedule,
        parameters=sum(tensor.numel() for tensor in create_network(experiment, "meta").parameters()),
        commits=describe_commits(run),
        projections=costs.project_full_run(run),
        data=run.read_content("data"),
        configuration=config.to_yaml(experiment).rstrip(),
    )


def describe_commits(run: RunFiles) -> str:
    """Return the commit of all stages; where they differ, each commit with its stages."""
    stages: dict[str, list[str]] = {}
    for stage in STAGES:
        for commit in run.commits_by_stage.get(stage, []):
            stages.setdefault(commit, []).append(stage)
    if len(stages) > 1:
        return " · ".join(f"{', '.join(names)} `{commit}`" for commit, names in stages.items())
    only = next(iter(stages), run.provenance.get("commit"))
    return f"`{only}`" if only else ""
