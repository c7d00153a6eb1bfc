"""Charts as SVG files, made of panels."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pipeline.drawing import style
from pipeline.store.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

SIZE, SMALL = (4.6, 2.9), (3.3, 2.6)  # inches: two and three to a row, one on a phone
MOST_POINTS = 1500
KINDS: dict[str, dict[str, str | float]] = {
    "clear": {"color": style.RUN, "linewidth": 1.6},
    "faint": {"color": style.RUN, "linewidth": 0.8, "alpha": 0.3},
    "steps": {"color": style.RUN, "linewidth": 1.6, "marker": "o", "markersize": 4},
    "other": {"color": style.OTHER, "linewidth": 1.2, "linestyle": "--"},
    "marks": {"color": style.OTHER, "linestyle": "none", "marker": "o", "markersize": 4},
    "best": {
        "color": style.GOOD, "linestyle": "none", "marker": "o", "markersize": 10, "markerfacecolor": "none",
        "markeredgewidth": 1.8,
    },
}  # fmt: skip
Series = tuple[Sequence[int], Sequence[float]]  # steps, values
Size = tuple[float, float]  # inches
Kind = Literal["clear", "faint", "marks", "steps", "best", "other", "bars"]


class Picture(NamedTuple):
    """A picture in the folder of a page, with its caption."""

    name: str
    caption: str


@dataclass(frozen=True)
class Line:
    """A line of `y` over `x`.

    kind: clear; faint behind a smoothed line; steps for few points; best for one of them; marks for others' points;
    other for others' line; bars, counted from 0; or a number, of a run among several, which has one colour in every
    panel. band: its half width around the line, or of a numbered line the standard error of each point.
    """

    x: Sequence[float]
    y: Sequence[float] | np.ndarray
    label: str = ""
    kind: Kind | int = "clear"
    band: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """A pair of axes with its lines; x: the label of the horizontal axis."""

    title: str
    x: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    size: Size = SIZE

    @property
    def legend_below(self) -> tuple[int, int]:
        """Columns and rows of the legend of several runs, which stands below the panel."""
        labels = [line.label for line in self.lines if line.label and isinstance(line.kind, int)]
        columns = 2 if len(labels) > 3 else 1
        return columns, -(-len(labels) // columns)


def save_panels(panels: Sequence[Panel], file: Path) -> None:
    """Write panels side by side as one SVG file, which follows the reader's light or dark theme."""
    import matplotlib.style
    from matplotlib.figure import Figure

    stream = io.StringIO()
    # The salt makes the ids in the SVG repeatable.
    with matplotlib.style.context({**style.CHARTS, "svg.hashsalt": file.stem}):
        width = sum(panel.size[0] for panel in panels)
        height = panels[0].size[1] + 0.17 * panels[0].legend_below[1]
        figure = Figure(figsize=(width, height), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_lines(axes, panel)
            axes.set(title=panel.title, xlabel=panel.x)
            axes.tick_params(which="both", length=0)
            _label_ticks(axes.xaxis)
            _label_ticks(axes.yaxis)
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    head, start, body = stream.getvalue().partition("<defs>")
    write_text(file, f"{head}<style>{style.CHARTS_CSS}</style>{start}{body}")


def save_picture(folder: Path, name: str, panel: Panel, caption: str) -> Picture:
    save_panels([panel], folder / f"{name}.svg")
    return Picture(f"{name}.svg", caption)


def plot_rate_distortion(
    rows: Sequence[Mapping[str, float]], paper: Mapping[int, tuple[float, float]] = MappingProxyType({})
) -> list[Panel]:
    """Make the three panels of the paper's Fig. 5, with the paper's own {k: (rate, RMSE)} as marks.

    rows: k = T − t, rate_bpd in bits/dim, rmse on the scale 0 to 255.
    """
    names = {"k": "reverse steps T − t", "rate_bpd": "Rate, bits/dim", "rmse": "RMSE"}
    printed = [{"k": k, "rate_bpd": rate, "rmse": rmse} for k, (rate, rmse) in paper.items()]

    def plot(x: str, y: str) -> Panel:
        ours = Line([row[x] for row in rows], [row[y] for row in rows], "this run" if paper else "")
        theirs = Line([row[x] for row in printed], [row[y] for row in printed], "paper, Table 4", "marks")
        return Panel(names[y], names[x], [ours, theirs] if paper else [ours], size=SMALL)

    return [plot("k", "rmse"), plot("k", "rate_bpd"), plot("rate_bpd", "rmse")]


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return the running mean (n,); the window is 4 % of the points, and shorter at both ends."""
    window = np.ones(2 * int(len(values) * 0.04 / 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _draw_lines(axes: Axes, panel: Panel) -> None:
    axes.set(xscale="log" if panel.log_x else "linear", yscale="log" if panel.log_y else "linear")
    for line in panel.lines:
        if line.kind == "bars":
            axes.bar(line.x, line.y, color=style.RUN, width=0.7)
            axes.set_xticks(line.x if len(line.x) <= 20 else [])
            axes.grid(axis="x", visible=False)
            continue
        every, look = max(1, len(line.x) // MOST_POINTS), _choose_style(line.kind)
        (drawn,) = axes.plot(line.x[::every], line.y[::every], label=line.label or None)
        drawn.set(**look)
        if line.band is not None and isinstance(line.kind, int):
            drawn.set(marker="o", markersize=4)
            axes.errorbar(line.x, line.y, line.band, fmt="none", ecolor=look["color"])
        elif line.band is not None:
            axes.fill_between(line.x, line.y - line.band, line.y + line.band, color=style.RUN, alpha=0.2)
    columns, rows = panel.legend_below
    if rows:
        axes.figure.legend(loc="outside lower left", ncols=columns, fontsize=8)
    elif any(line.label for line in panel.lines):
        axes.legend()


def _choose_style(kind: Kind | int) -> Mapping[str, Any]:
    """Return the style of a kind of line, or of a number: all colours come before the next kind of dashes."""
    if isinstance(kind, str):
        return KINDS[kind]
    dashes, colour = divmod(kind, len(style.SERIES))
    return {"color": style.SERIES[colour], "linestyle": style.DASHES[dashes % len(style.DASHES)]}


def _label_ticks(axis: Axis) -> None:
    """Write tick labels as 0.02, 10⁻⁶, 20k."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    if axis.get_scale() == "log":
        axis.set_minor_locator(
            LogLocator(subs=(2, 3, 5) if high / low < 30 else (2, 5) if high / low < 500 else ())
        )
        axis.set_minor_formatter(FuncFormatter(_format_tick))
    if axis.get_scale() == "log" or high >= 10_000:
        axis.set_major_formatter(FuncFormatter(_format_tick))


def _format_tick(value: float, _: float) -> str:
    exponent = math.log10(value) if value > 0 else 0
    if not -3.5 < exponent < 5.5 and abs(exponent - round(exponent)) < 1e-9:
        return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
