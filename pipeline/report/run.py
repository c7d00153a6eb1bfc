"""The page of one run. Whatever is not there yet is left out, with the command that makes it."""

from pathlib import Path

from pipeline import config
from pipeline.report import costs, graphs, paper, pictures, scores
from pipeline.report.page import TEMPLATE
from pipeline.report.source import Source
from pipeline.scores.metrics import METRICS
from pipeline.store.checkpoint import create_network
from pipeline.store.run import STAGES


def write_markdown(source: Source, folder: Path) -> str:
    """Write the page as Markdown, its pictures into `folder`."""
    e, bound, selection = source.experiment, source.bound, source.read("selection")
    figures = pictures.copy_figures(source, folder)
    figure_5 = figures.pop(pictures.FIGURE_5, None)
    table_4 = paper.TABLE_4 if source.is_cifar10 and paper.has_its_schedule(e.diffusion) else {}
    # Our own panels add the paper's points; without these they would be the figure once more.
    has_panels = bound and (table_4 or not figure_5)
    checkpoints, ladder, chart = {}, {}, None
    if selection:
        metric = METRICS[selection["metric"]]
        ladder = paper.LADDER if source.is_cifar10 and metric.name == "fid" else {}
        checkpoints = {row["step"]: row[metric.name] for row in selection["scores"]}
        chart = graphs.draw_checkpoints(checkpoints, selection["best"], metric, ladder, folder)
    last_alpha_bar, schedule = graphs.draw_schedule(e.diffusion, folder)
    shares = source.metrics.get("class_shares")
    return TEMPLATE.get_template("run.md").render(
        run=source,
        STAGES=STAGES,
        useless=scores.compare_with_linear(source),
        headline=scores.write_headline(source),
        notes=scores.list_notes(source),
        departures="; ".join(scores.list_departures(source)),
        skipped=source.read("figures").get("skipped", {}),
        samples=pictures.copy_samples(source, figures, folder),
        class_shares=[graphs.draw_class_shares(shares, folder)] if shares else [],
        curves=graphs.draw_training(source, folder),
        step_grids=pictures.copy_step_grids(source, folder),
        selection=selection,
        checkpoints=checkpoints,
        ladder=ladder,
        checkpoint_chart=chart,
        terms=graphs.draw_bound(bound, folder) if bound and "nll_bpd" in source.scores else [],
        table_4=table_4,
        figure_5=figure_5,
        rate_distortion=graphs.draw_rate_distortion(bound, table_4, folder) if bound and has_panels else [],
        last_alpha_bar=last_alpha_bar,
        schedule=schedule,
        parameters=sum(tensor.numel() for tensor in create_network(e, "meta").parameters()),
        commits=list_commits(source),
        projections=costs.project_full_run(source),
        data=source.read("data"),
        configuration=config.to_yaml(e).rstrip(),
    )


def list_commits(source: Source) -> str:
    """Name one commit where all stages have the same; else the stages of each."""
    stages: dict[str, list[str]] = {}
    for stage in STAGES:
        for commit in source.commits.get(stage, []):
            stages.setdefault(commit, []).append(stage)
    if len(stages) > 1:
        return " · ".join(f"{', '.join(names)} `{commit}`" for commit, names in stages.items())
    only = next(iter(stages), source.made_with.get("commit"))
    return f"`{only}`" if only else ""
