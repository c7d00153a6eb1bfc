"""The bound and its parts, and the noise schedule they are taken over."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm.config import DiffusionConfig
from ddpm.schedules import betas
from pipeline.drawing import charts
from pipeline.drawing.charts import SMALL, Line, Picture
from pipeline.report import paper
from pipeline.report.paper_tables import format_difference
from pipeline.report.source import Nll, Source


def draw_terms(nll: Nll, folder: Path) -> list[Picture]:
    """Draw the terms of the bound and the error of the estimate of x_0 over t."""
    t = range(1, len(nll["terms"]) + 1)
    rmse = [127.5 * value**0.5 for value in nll["mse"]]
    terms = charts.curves("NLL terms, bits/dim", "t", [Line(t, nll["terms"])], log_x=True, log_y=True)
    error = charts.curves("RMSE of the estimate of x_0", "t", [Line(t, rmse)])
    scale = "Root mean square error of the estimate of x_0, on the scale 0 to 255"
    return [
        charts.draw(folder, "terms", terms, "Term of the bound at each t; the first is the decoder's L_0"),
        charts.draw(folder, "error", error, scale),
    ]


def get_table_4(source: Source) -> dict[int, tuple[float, float]]:
    """Return the paper's Table 4 where a run can stand beside it."""
    its = source.is_cifar10 and paper.has_its_schedule(source.experiment.diffusion)
    return paper.TABLE_4 if its else {}


def draw_rate_distortion(
    rows: list[dict[str, float]], table: dict[int, tuple[float, float]], folder: Path
) -> list[Picture]:
    """Draw the panels of Fig. 5 as pictures of their own, with the paper's points."""
    captions = {
        "rd-distortion": "RMSE against reverse steps T − t (paper, Fig. 5)",
        "rd-rate": "Rate, bits/dim against reverse steps T − t (paper, Fig. 5)",
        "rd": "RMSE against rate, bits/dim (paper, Fig. 5)",
    }
    panels = zip(captions.items(), charts.rate_distortion(rows, table), strict=True)
    return [charts.draw(folder, name, panel, caption) for (name, caption), panel in panels]


def compare_chain_end(last: dict[str, float]) -> list[list[str]]:
    """After all steps: beside the paper, and beside the line that takes no training."""
    lines = {
        "**this run**": (last["rate_bpd"], last["rmse"]),
        "paper, Table 4": paper.TABLE_4[1000],
        "best linear denoiser": tuple(paper.LMMSE.values()),
    }
    return [[name, *(f"{value:.4f}" for value in values)] for name, values in lines.items()]


def tabulate_chain(
    rows: list[dict[str, float]], table: dict[int, tuple[float, float]]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of every tenth of the reverse process, as in Table 4, with the differences from it."""
    tenth, cells = max(1, len(rows) // 10), []
    for row in reversed(rows):
        if row["k"] % tenth:
            continue
        numbers = []
        for number, key in enumerate(("rate_bpd", "rmse")):
            numbers.append(f"{row[key]:.5f}")
            if its := table.get(int(row["k"])):
                numbers += [f"{its[number]:.5f}", format_difference(row[key] - its[number], 5)]
        cells.append([f"{row['k']:,}", *numbers])
    both = ["Rate, bits/dim", "paper", "difference", "RMSE", "paper", "difference"]
    return ["Reverse steps", *(both if table else both[::3])], cells


def draw_schedule(diffusion: DiffusionConfig, folder: Path) -> tuple[float, list[Picture]]:
    """Draw beta, alpha_bar and their signal-to-noise ratio over t; with alpha_bar at t = T."""
    beta = betas(diffusion.beta_schedule, diffusion.timesteps, diffusion.beta_start, diffusion.beta_end)
    alpha_bar = torch.cumprod(1 - beta, 0)
    snr = alpha_bar / (1 - alpha_bar)
    t, pictures = range(1, len(beta) + 1), []
    for name, title, y, caption in (
        ("beta", "β", beta, "Variance added at each step"),
        ("alpha-bar", "ᾱ", alpha_bar, "Share of the image's variance in x_t"),
        ("snr", "ᾱ / (1 − ᾱ)", snr, "Signal-to-noise ratio of x_t"),
    ):
        panel = charts.curves(title, "t", [Line(t, y.tolist())], log_y=name == "snr", size=SMALL)
        pictures.append(charts.draw(folder, name, panel, caption))
    return alpha_bar[-1].item(), pictures
