"""The page of one run. Whatever is not there yet is left out, with the command that makes it."""

from __future__ import annotations

from pathlib import Path

from pipeline import config
from pipeline.report import costs, likelihood, paper_tables, pictures, scores, training
from pipeline.report.page import MARKDOWN_TEMPLATES
from pipeline.report.source import Source


def write_markdown(source: Source, folder: Path) -> str:
    """Write the page as Markdown, its pictures into `folder`."""
    figures = pictures.copy_figures(source, folder)
    nll = source.nll if source.nll and "nll_bpd" in source.scores else None
    rows = source.nll["rate_distortion"] if source.nll else []
    table_4 = likelihood.get_table_4(source)
    figure_5 = figures.get(pictures.FIGURE_5)
    # Our own panels add the paper's points; without these they would be the figure once more.
    has_panels = rows and (table_4 or not figure_5)
    last_alpha_bar, schedule = likelihood.draw_schedule(source.experiment.diffusion, folder)
    return MARKDOWN_TEMPLATES.get_template("run.md").render(
        run=source,
        useless=scores.compare_with_linear(source),
        headline=scores.write_headline(source),
        cards=scores.list_cards(source),
        paper=paper_tables.place_run(source),
        score_table=scores.tabulate_scores(source),
        protocol_facts=scores.list_protocol(source.protocol),
        skipped=source.read("figures").get("skipped", {}),
        samples=pictures.copy_samples(source, figures, folder),
        class_shares=pictures.draw_class_shares(source, folder),
        curves=training.draw_curves(source, folder),
        step_grids=pictures.copy_step_grids(source, folder),
        selection=source.read("selection"),
        checkpoints=training.describe_checkpoints(source, folder),
        terms=likelihood.draw_terms(nll, folder) if nll else [],
        table_4=likelihood.tabulate_chain(rows, table_4) if rows else None,
        figure_5=figure_5,
        rate_distortion=likelihood.draw_rate_distortion(rows, table_4, folder) if has_panels else [],
        chain_end=likelihood.compare_chain_end(rows[-1]) if rows and table_4 else [],
        last_alpha_bar=last_alpha_bar,
        schedule=schedule,
        work=costs.list_work(source),
        projections=costs.project_full_run(source),
        data=costs.list_data(source),
        configuration=config.to_yaml(source.experiment).rstrip(),
    )
