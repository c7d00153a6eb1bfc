"""Curves as SVG, in the light colours of the report, which shows them in its reader's theme."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.config import Experiment
from pipeline.stages.figures.figure import Figure, Unavailable
from pipeline.store.keys import evaluate_key
from pipeline.store.run import Run, atomic_file, read_json

INK, SOFT, LINE, RUN, PAPER = "#1c2430", "#5d6878", "#dfe4ea", "#1769c2", "#ffffff"
PANEL = (3.3, 2.6)  # inches


@dataclass(frozen=True)
class Panel:
    """`y` over `x`, both named."""

    title: str
    x_name: str
    y_name: str
    x: Sequence[float]
    y: Sequence[float]


def rate_distortion(experiment: Experiment, run: Run) -> Figure:
    """Fig. 5, from the evaluation's nll.json."""
    nll = run.evaluation(evaluate_key(experiment, run.run_key)) / "nll.json"
    if "nll" not in experiment.evaluate.metrics or not nll.exists():
        raise Unavailable(
            f"it needs the bound: `ddpm evaluate {experiment.name}` with nll among evaluate.metrics makes it"
        )
    caption = (
        f"Progressive lossy compression of {read_json(nll)['n']:,} test images: rate, and error of the estimate "
        "of x_0 on the scale 0 to 255 (paper, Fig. 5)"
    )
    return Figure("rate_distortion.svg", caption, {}, partial(_draw_rate_distortion, nll))


def _draw_rate_distortion(nll: Path, files: list[Path], file: Path) -> None:
    rows = read_json(nll)["rate_distortion"]
    k, rate, error = ([row[key] for row in rows] for key in ("k", "rate_bpd", "rmse"))
    steps, bits, rmse = "reverse steps T − t", "rate, bits/dim", "distortion, RMSE"
    save(
        [
            Panel("Distortion", steps, rmse, k, error),
            Panel("Rate", steps, bits, k, rate),
            Panel("Rate and distortion", bits, rmse, rate, error),
        ],
        file,
    )


def save(panels: Sequence[Panel], file: Path) -> None:
    """Beside each other; equal bytes for equal numbers."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    settings = {
        "svg.fonttype": "none", "svg.hashsalt": file.stem, "font.size": 9, "text.color": INK,
        "axes.labelcolor": SOFT, "axes.edgecolor": LINE, "axes.grid": True, "grid.color": LINE,
        "axes.titlecolor": INK, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
        "axes.spines.top": False, "axes.spines.right": False, "xtick.color": LINE, "ytick.color": LINE,
        "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT, "figure.facecolor": PAPER, "axes.facecolor": PAPER,
    }  # fmt: skip
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        canvas = Canvas(figsize=(PANEL[0] * len(panels), PANEL[1]), layout="constrained")
        for axes, panel in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.plot(panel.x, panel.y, color=RUN, linewidth=1.6)
            axes.set(title=panel.title, xlabel=panel.x_name, ylabel=panel.y_name)
            axes.tick_params(which="both", length=0)
        with atomic_file(file) as temporary:
            canvas.savefig(temporary, format="svg", metadata={"Date": None})
