"""The bound and its parts, and the noise schedule they are taken over."""

from __future__ import annotations

import torch

from ddpm.schedules import betas
from pipeline.report import paper, plots
from pipeline.report.page import Block, Pictures, Table, Text
from pipeline.report.pictures import RATE_DISTORTION, figures
from pipeline.report.source import Source, missing


def section(source: Source) -> list[Block]:
    nll, scores = source.read("nll"), source.metrics["scores"]
    if not nll or "nll_bpd" not in scores:
        return missing(source, "There are no NLL terms yet", "evaluate")
    said = (
        f"**NLL ≤ {scores['nll_bpd']:.4f} bits/dim** = rate {scores['rate_bpd']:.4f} (L_1 to L_T) "
        f"+ distortion {scores['distortion_bpd']:.4f} (L_0), the prior's L_T being {nll['prior']:.2e}; "
        f"means over {nll['n']:,} test images, one noise draw for each timestep."
    )
    return [Text(said), Pictures(plots.likelihood(nll["terms"], nll["mse"]))]


def rate_distortion(source: Source) -> list[Block]:
    rows = source.read("nll").get("rate_distortion", [])
    if not rows:
        return []
    beside = paper.TABLE_4 if source.is_cifar10 else {}
    said = (
        "What x_t costs when it is sent step by step, and how far off the estimate of x_0 then is, on the scale "
        "0 to 255."
    )
    drawn = figures(source).get(RATE_DISTORTION)
    # Our own panels add the paper's points; without these they would be the figure once more.
    panels = [Pictures(plots.rate_distortion(rows, beside))] if beside or not drawn else []
    return [Text(said), *([Pictures([drawn], wide=True)] if drawn else []), *panels, _table_4(rows, beside)]


def _table_4(rows: list[dict[str, float]], beside: dict[int, tuple[float, float]]) -> Table:
    """Every tenth of the reverse process, as the paper's Table 4."""
    tenth = max(1, len(rows) // 10)
    cells = []
    for row in reversed(rows):
        if row["k"] % tenth == 0:
            its = beside.get(int(row["k"]), ())
            cells.append([f"{row['k']}", *(f"{x:.5f}" for x in (row["rate_bpd"], row["rmse"], *its))])
    return Table(
        ["Reverse steps", "Rate, bits/dim", "RMSE", "Paper: rate", "Paper: RMSE"][: len(cells[0])], cells
    )


def schedule(source: Source) -> list[Block]:
    d = source.experiment.diffusion
    beta = betas(d.beta_schedule, d.timesteps, d.beta_start, d.beta_end)
    alpha_bar = torch.cumprod(1 - beta, 0)
    said = (
        f"`{d.beta_schedule}`, T = {d.timesteps:,}; at t = T the image keeps ᾱ = {alpha_bar[-1].item():.2e}."
    )
    return [Text(said), Pictures(plots.schedule(beta.tolist(), alpha_bar.tolist()))]
