"""The bound and its parts, and the noise schedule they are taken over."""

from __future__ import annotations

import torch

from ddpm.schedules import betas
from pipeline.report import paper, plots
from pipeline.report.beside_paper import signed
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
    its = source.is_cifar10 and paper.has_its_schedule(source.experiment.diffusion)
    beside = paper.TABLE_4 if its else {}
    said = (
        "What x_t costs when it is sent step by step, and how far off the estimate of x_0 then is, on the scale "
        "0 to 255."
    )
    drawn = figures(source).get(RATE_DISTORTION)
    blocks: list[Block] = [Text(said), *([Pictures([drawn], wide=True)] if drawn else [])]
    # Our own panels add the paper's points; without these they would be the figure once more.
    if beside or not drawn:
        blocks.append(Pictures(plots.rate_distortion(rows, beside), small=True))
    return [
        *blocks,
        *([*_end(rows[-1]), Text("The paper's Table 4:")] if beside else []),
        _table_4(rows, beside),
    ]


def _end(last: dict[str, float]) -> list[Block]:
    """After all steps: beside the paper, and beside the line that takes no training."""
    lines = [
        ("this run", (last["rate_bpd"], last["rmse"])),
        ("paper, Table 4", paper.TABLE_4[1000]),
        ("best linear denoiser", tuple(paper.LMMSE.values())),
    ]
    said = (
        "At the end of the chain. The best linear denoiser has the mean and the covariance of the test images and "
        "needs no training; its rate is that of the linear schedule with `fixedlarge`. A network that does not "
        "beat it is not yet useful."
    )
    cells = [[name, *(f"{value:.4f}" for value in values)] for name, values in lines]
    return [Text(said), Table(("", "Rate, bits/dim", "RMSE"), cells, frozenset({0}))]


def _table_4(rows: list[dict[str, float]], beside: dict[int, tuple[float, float]]) -> Table:
    """Every tenth of the reverse process, as the paper's Table 4, with the differences from it."""
    tenth, cells = max(1, len(rows) // 10), []
    for row in reversed(rows):
        if row["k"] % tenth:
            continue
        ours, its = (row["rate_bpd"], row["rmse"]), beside.get(int(row["k"]), ())
        numbers = [f"{value:.5f}" for value in ours]
        if its:
            pairs = zip(ours, its, strict=True)
            numbers = [said for a, b in pairs for said in (f"{a:.5f}", f"{b:.5f}", signed(a - b, 5))]
        cells.append([f"{row['k']:,}", *numbers])
    both = ("Rate, bits/dim", "paper", "difference", "RMSE", "paper", "difference")
    return Table(("Reverse steps", *(both if beside else both[::3])), cells)


def schedule(source: Source) -> list[Block]:
    d = source.experiment.diffusion
    beta = betas(d.beta_schedule, d.timesteps, d.beta_start, d.beta_end)
    alpha_bar = torch.cumprod(1 - beta, 0)
    said = (
        f"`{d.beta_schedule}`, T = {d.timesteps:,}; at t = T the image keeps ᾱ = {alpha_bar[-1].item():.2e}."
    )
    return [Text(said), Pictures(plots.schedule(beta.tolist(), alpha_bar.tolist()), small=True)]
