"""Small plots as SVG, in the colours of `pipeline.report.style`, equal bytes for equal numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.report.page import Picture
from pipeline.report.style import COLOURS, SERIES

SIZE, SMALL = (4.6, 2.9), (3.3, 2.5)  # inches: two and three to a row, one on a phone
MOST_POINTS = 1500


@dataclass(frozen=True)
class Line:
    """`y` over `x`; `kind` faint is for what a clear line smooths, marks for someone else's few points,
    steps for few points of our own, best for the one among them."""

    x: Sequence[float]
    y: Sequence[float] | np.ndarray
    label: str = ""
    kind: Literal["clear", "faint", "marks", "steps", "best"] = "clear"


_KINDS: dict[str, dict[str, Any]] = {
    "clear": {"color": COLOURS["run"][0], "linewidth": 1.6},
    "faint": {"color": COLOURS["run"][0], "linewidth": 0.8, "alpha": 0.3},
    "steps": {"color": COLOURS["run"][0], "linewidth": 1.6, "marker": "o", "markersize": 4},
    "best": {
        "color": COLOURS["good"][0],
        "linestyle": "none",
        "marker": "o",
        "markersize": 10,
        "markerfacecolor": "none",
        "markeredgewidth": 1.8,
    },
    "marks": {"color": COLOURS["other"][0], "linestyle": "none", "marker": "o", "markersize": 4},
}


def _settings(name: str) -> Any:
    ink, soft, line = (COLOURS[key][0] for key in ("ink", "soft", "line"))
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "text.color": ink,
        "axes.labelcolor": soft,
        "axes.edgecolor": line,
        "axes.titlecolor": ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": line,
        "grid.linewidth": 0.7,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": soft,
        "ytick.labelcolor": soft,
        "legend.frameon": False,
        "figure.facecolor": COLOURS["paper"][0],
        "axes.facecolor": COLOURS["paper"][0],
    }


def curve(
    name: str,
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    caption: str,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[float, float] = SIZE,
) -> Picture:
    """Lines over one pair of axes; `x` names the horizontal one, the title what is drawn."""

    def draw(axes: Any) -> None:
        for line in lines:
            every = max(1, len(line.x) // MOST_POINTS)
            label = line.label or None
            axes.plot(line.x[::every], line.y[::every], label=label, **_KINDS[line.kind])
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        if any(line.label for line in lines):
            axes.legend()

    return _picture(name, title, x, caption, draw, size)


def bars(name: str, title: str, heights: Sequence[float], *, x: str, caption: str) -> Picture:
    """One bar for each of the numbers, counted from 0."""

    def draw(axes: Any) -> None:
        axes.bar(range(len(heights)), heights, color=COLOURS["run"][0], width=0.7)
        axes.set_xticks(range(len(heights)) if len(heights) <= 20 else [])
        axes.grid(axis="x", visible=False)

    return _picture(name, title, x, caption, draw)


def ranked(name: str, title: str, values: Sequence[tuple[str, float]], caption: str) -> Picture:
    """A bar for each named value, in order from the top, the first one standing out."""

    def draw(axes: Any) -> None:
        places, (labels, widths) = range(len(values)), zip(*values, strict=True)
        bars = axes.barh(places, widths, color=COLOURS["run"][0], height=0.62)
        for bar in bars[1:]:
            bar.set_alpha(0.4)
        axes.set_yticks(places, labels)
        axes.bar_label(bars, fmt="{:,.2f}", padding=3, fontsize=8, color=COLOURS["ink"][0])
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)

    return _picture(name, title, "", caption, draw, (SIZE[0], 0.9 + 0.3 * len(values)))


def losses(name: str, title: str, runs: Sequence[tuple[str, int, Sequence[dict[str, Any]]]]) -> Picture:
    """(label, place, points of log.jsonl) of each run; a run keeps the colour of its place in every panel."""

    def draw(axes: Any) -> None:
        for label, place, points in runs:
            seen = [(p["step"], p["metrics"]["train/loss"]) for p in points if "train/loss" in p["metrics"]]
            x, y = zip(*seen, strict=True)
            dashes = ("-", "--", ":", "-.")[place // len(SERIES) % 4]
            colour = COLOURS[SERIES[place % len(SERIES)]][0]
            every = max(1, len(x) // MOST_POINTS)
            axes.plot(x[::every], smooth(y)[::every], label=label, color=colour, linestyle=dashes)
        axes.set_yscale("log")
        axes.figure.legend(loc="outside lower left", ncols=2 if len(runs) > 3 else 1, fontsize=8)

    several = 0.17 * (len(runs) if len(runs) <= 3 else -(-len(runs) // 2))
    return _picture(name, title, "step", "Training loss, smoothed", draw, (SIZE[0], SIZE[1] + several))


def _picture(
    name: str, title: str, x: str, caption: str, draw: Any, size: tuple[float, float] = SIZE
) -> Picture:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_settings(name)):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.tick_params(which="both", length=0)
        for axis in (axes.xaxis, axes.yaxis):
            _label(axis)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return Picture(f"{name}.svg", stream.getvalue(), caption)


def _label(axis: Any) -> None:
    """Ticks as a person writes them: 0.02, 10⁻⁶, 20k."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    if axis.get_scale() == "log":
        axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        narrow = high / low < 500
        axis.set_minor_locator(LogLocator(subs=(2, 3, 5) if high / low < 30 else (2, 5) if narrow else ()))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: _short(value)))
    elif high >= 10_000:
        axis.set_major_formatter(EngFormatter(sep=""))


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    plain = -3 <= exponent <= 5
    return (
        _short(value)
        if plain
        else "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def smooth(values: Sequence[float], share: float = 0.04) -> np.ndarray:
    """Running mean over a share of the points, its window cut off at both ends."""
    y = np.asarray(values, dtype=np.float64)
    half = int(len(y) * share / 2)
    total = np.concatenate([[0.0], np.cumsum(y)])
    place = np.arange(len(y))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(y))
    return (total[last] - total[first]) / (last - first)


# What the report draws


def training(points: Sequence[dict[str, Any]]) -> list[Picture]:
    """The curves of log.jsonl's points."""
    wanted = {
        "train/loss": ("loss", "Loss", True, "Loss, per window of steps (faint) and smoothed"),
        "train/grad_norm": ("grad-norm", "Gradient norm", True, "Gradient norm before clipping"),
        "train/lr": ("lr", "Learning rate", False, "Learning rate"),
        "train/images_per_second": ("speed", "Images per second", False, "Images per second, all workers"),
    }
    pictures = []
    for key, (name, title, log, caption) in wanted.items():
        seen = [(p["step"], p["metrics"][key]) for p in points if key in p["metrics"]]
        if seen:
            x, y = zip(*seen, strict=True)
            clear = [Line(x, y)] if key == "train/lr" else [Line(x, y, kind="faint"), Line(x, smooth(y))]
            pictures.append(curve(name, title, clear, x="step", caption=caption, log_y=log))
    return pictures


def likelihood(terms: Sequence[float], mse: Sequence[float]) -> list[Picture]:
    """terms (T,) in bits/dim and mse (T,) on [-1, 1], from t = 1."""
    t = range(1, len(terms) + 1)
    rmse = [127.5 * value**0.5 for value in mse]
    caption = "Term of the bound at each t; the first is the decoder's L_0"
    error = "Root mean square error of the estimate of x_0, on the scale 0 to 255"
    parts = [Line(t, terms)]
    return [
        curve("terms", "NLL terms, bits/dim", parts, x="t", caption=caption, log_x=True, log_y=True),
        curve("error", "RMSE of the estimate of x_0", [Line(t, rmse)], x="t", caption=error),
    ]


def rate_distortion(rows: Sequence[dict[str, float]], paper: dict[int, tuple[float, float]]) -> list[Picture]:
    """The three panels of the paper's Fig. 5, with the paper's own {k: (rate, RMSE)} as marks."""
    ours = {key: [row[key] for row in rows] for key in ("k", "rate_bpd", "rmse")}
    rates, errors = [rate for rate, _ in paper.values()], [error for _, error in paper.values()]
    its: dict[str, Sequence[float]] = {"k": list(paper), "rate_bpd": rates, "rmse": errors}
    names = {"k": "reverse steps T − t", "rate_bpd": "Rate, bits/dim", "rmse": "RMSE"}

    def panel(name: str, across: str, up: str) -> Picture:
        lines = [Line(ours[across], ours[up], "this run" if paper else "")]
        if paper:
            lines.append(Line(its[across], its[up], "paper, Table 4", "marks"))
        caption = f"{names[up]} against {names[across][0].lower() + names[across][1:]} (paper, Fig. 5)"
        return curve(name, names[up], lines, x=names[across], caption=caption, size=SMALL)

    return [
        panel("rd-distortion", "k", "rmse"),
        panel("rd-rate", "k", "rate_bpd"),
        panel("rd", "rate_bpd", "rmse"),
    ]


def selection(scores: dict[int, float], best: int, name: str, ladder: dict[int, float]) -> Picture:
    """{step: score} of the checkpoints, the best one ringed, beside the published {step: FID}."""
    lines = [Line(list(scores), list(scores.values()), "this run" if ladder else "", "steps")]
    lines.append(Line([best], [scores[best]], "best", "best"))
    if ladder:
        lines.append(Line(list(ladder), list(ladder.values()), "published, n = 50,000", "marks"))
    caption = f"{name} against training steps" + (", beside the published ladder" if ladder else "")
    return curve("selection", name, lines, x="step", caption=caption, log_y=bool(ladder), log_x=bool(ladder))


def schedule(beta: Sequence[float], alpha_bar: Sequence[float]) -> list[Picture]:
    """beta and alpha_bar (T,), from t = 1."""
    t = range(1, len(beta) + 1)
    snr = [share / (1 - share) for share in alpha_bar]

    def panel(name: str, title: str, y: Sequence[float], caption: str, log: bool = False) -> Picture:
        return curve(name, title, [Line(t, y)], x="t", caption=caption, log_y=log, size=SMALL)

    return [
        panel("beta", "β", beta, "Variance added at each step"),
        panel("alpha-bar", "ᾱ", alpha_bar, "Share of the image's variance in x_t"),
        panel("snr", "ᾱ / (1 − ᾱ)", snr, "Signal-to-noise ratio of x_t", log=True),
    ]
