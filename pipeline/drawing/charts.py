"""Charts as SVG. A panel is one pair of axes; a picture holds one panel, or several beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pipeline.drawing import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

SIZE, SMALL = (4.6, 2.9), (3.3, 2.6)  # inches: two and three to a row, one on a phone
MOST_POINTS = 1500
KINDS: dict[str, dict[str, str | float]] = {
    "clear": {"color": style.RUN, "linewidth": 1.6},
    "faint": {"color": style.RUN, "linewidth": 0.8, "alpha": 0.3},
    "steps": {"color": style.RUN, "linewidth": 1.6, "marker": "o", "markersize": 4},
    "marks": {"color": style.OTHER, "linestyle": "none", "marker": "o", "markersize": 4},
    "best": {
        "color": style.GOOD, "linestyle": "none", "marker": "o", "markersize": 10, "markerfacecolor": "none",
        "markeredgewidth": 1.8,
    },
}  # fmt: skip
Series = tuple[Sequence[int], Sequence[float]]  # steps, values


class Picture(NamedTuple):
    """A file of a page's folder, and what it shows."""

    name: str
    caption: str


@dataclass(frozen=True)
class Panel:
    """`title` names what is drawn, `x` the horizontal axis; `size` in inches."""

    title: str
    x: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = SIZE


@dataclass(frozen=True)
class Line:
    """`y` over `x`; `kind` faint is for what a clear line smooths, marks for someone else's few points,
    steps for few points of our own, best for the one among them."""

    x: Sequence[float]
    y: Sequence[float] | np.ndarray
    label: str = ""
    kind: Literal["clear", "faint", "marks", "steps", "best"] = "clear"


def save_panels(panels: Sequence[Panel], file: Path) -> None:
    """Write the panels beside each other as one SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        style.apply_style(file.stem)
        width, height = sum(panel.size[0] for panel in panels), panels[0].size[1]
        figure = Figure(figsize=(width, height), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel.draw(axes)
            axes.set(title=panel.title, xlabel=panel.x)
            axes.tick_params(which="both", length=0)
            for axis in (axes.xaxis, axes.yaxis):
                _label_ticks(axis)
        style.save_svg(figure, file)


def save_picture(folder: Path, name: str, panel: Panel, caption: str) -> Picture:
    """Write one panel into a page's folder."""
    save_panels([panel], folder / f"{name}.svg")
    return Picture(f"{name}.svg", caption)


def plot_curves(
    title: str,
    x: str,
    lines: Sequence[Line],
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[float, float] = SIZE,
) -> Panel:
    """Make a panel of lines over one pair of axes."""

    def plot(axes: Axes) -> None:
        for line in lines:
            every = max(1, len(line.x) // MOST_POINTS)
            (drawn,) = axes.plot(line.x[::every], line.y[::every], label=line.label or None)
            drawn.set(**KINDS[line.kind])
        axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        if any(line.label for line in lines):
            axes.legend()

    return Panel(title, x, plot, size)


def plot_bars(title: str, x: str, heights: Sequence[float]) -> Panel:
    """Make a panel with one bar for each of the numbers, counted from 0."""

    def plot(axes: Axes) -> None:
        axes.bar(range(len(heights)), heights, color=style.RUN, width=0.7)
        axes.set_xticks(range(len(heights)) if len(heights) <= 20 else [])
        axes.grid(axis="x", visible=False)

    return Panel(title, x, plot)


def plot_ranking(title: str, values: Sequence[tuple[str, float]]) -> Panel:
    """Make a panel with a bar for each named value, in order from the top, the first one standing out."""

    def plot(axes: Axes) -> None:
        labels, widths = zip(*values, strict=True)
        bars = axes.barh(range(len(values)), widths, color=style.RUN, height=0.62)
        for bar in bars[1:]:
            bar.set_alpha(0.4)
        axes.set_yticks(range(len(values)), labels)
        axes.bar_label(bars, fmt="{:,.2f}", padding=3, fontsize=8, color=style.INK)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)

    return Panel(title, "", plot, (SIZE[0], 0.9 + 0.3 * len(values)))


def plot_losses(title: str, runs: Sequence[tuple[str, int, Series]]) -> Panel:
    """Make a panel of (label, place, losses) of each run; a run keeps the colour of its place in every panel."""

    def plot(axes: Axes) -> None:
        for label, place, (x, y) in runs:
            dashes, colour = divmod(place, len(style.SERIES))
            every = max(1, len(x) // MOST_POINTS)
            (line,) = axes.plot(x[::every], smooth(y)[::every], label=label, color=style.SERIES[colour])
            line.set(linestyle=style.DASHES[dashes % len(style.DASHES)])
        axes.set_yscale("log")
        axes.figure.legend(loc="outside lower left", ncols=columns, fontsize=8)

    columns = 2 if len(runs) > 3 else 1
    return Panel(title, "step", plot, (SIZE[0], SIZE[1] + 0.17 * -(-len(runs) // columns)))


def plot_rate_distortion(
    rows: Sequence[Mapping[str, float]], paper: Mapping[int, tuple[float, float]] = MappingProxyType({})
) -> list[Panel]:
    """Make the three panels of the paper's Fig. 5; the paper's own {k: (rate, RMSE)} are marks.

    rows: k = T − t, rate_bpd in bits/dim, rmse on the scale 0 to 255.
    """
    names = {"k": "reverse steps T − t", "rate_bpd": "Rate, bits/dim", "rmse": "RMSE"}
    printed = [{"k": k, "rate_bpd": rate, "rmse": rmse} for k, (rate, rmse) in paper.items()]
    panels = []
    for across, up in (("k", "rmse"), ("k", "rate_bpd"), ("rate_bpd", "rmse")):
        lines = [Line([row[across] for row in rows], [row[up] for row in rows], "this run" if paper else "")]
        if paper:
            x, y = [row[across] for row in printed], [row[up] for row in printed]
            lines.append(Line(x, y, "paper, Table 4", "marks"))
        panels.append(plot_curves(names[up], names[across], lines, size=SMALL))
    return panels


def smooth(values: Sequence[float], share: float = 0.04) -> np.ndarray:
    """Running mean (n,) over a share of the points, its window cut off at both ends."""
    window = np.ones(2 * int(len(values) * share / 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _label_ticks(axis: Axis) -> None:
    """Write ticks as a person does: 0.02, 10⁻⁶, 20k."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    if axis.get_scale() == "log":
        axis.set_major_formatter(FuncFormatter(lambda value, _: _format_power(value)))
        narrow = high / low < 500
        axis.set_minor_locator(LogLocator(subs=(2, 3, 5) if high / low < 30 else (2, 5) if narrow else ()))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: _format_short(value)))
    elif high >= 10_000:
        axis.set_major_formatter(EngFormatter(sep=""))


def _format_short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _format_power(value: float) -> str:
    exponent = round(math.log10(value))
    if -3 <= exponent <= 5:
        return _format_short(value)
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
