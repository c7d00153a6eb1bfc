"""The figure of rate and distortion (Fig. 5)."""

from functools import partial
from pathlib import Path

from pipeline.config import Experiment
from pipeline.drawing import charts
from pipeline.stages.figures.figure import Figure, Unavailable
from pipeline.store.files import read_json
from pipeline.store.run import Place


def rate_distortion(experiment: Experiment, run: Place) -> Figure:
    """Fig. 5, from the evaluation's nll.json."""
    nll = run.of(experiment).nll_json
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
    charts.save(charts.rate_distortion(read_json(nll)["rate_distortion"]), file)
