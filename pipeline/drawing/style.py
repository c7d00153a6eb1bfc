"""Colours and fonts of charts and pages, light and dark."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.store.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name: (light, dark)
COLOURS = {
    "paper": ("#ffffff", "#16191f"),
    "ink": ("#1c2430", "#e4e8ee"),
    "soft": ("#5d6878", "#98a3b3"),
    "line": ("#dfe4ea", "#2d333d"),
    "run": ("#1769c2", "#6cb2ff"),
    "other": ("#c2570c", "#ffa657"),
    "good": ("#1a7f4b", "#56d08b"),
    "warn": ("#9a6200", "#e3b341"),
    "violet": ("#7446b8", "#b89cf5"),
    "pink": ("#b42d68", "#f58ab4"),
    "teal": ("#0d7580", "#4fcbd6"),
}
PAPER, INK, SOFT, LINE, RUN, OTHER, GOOD = (light for light, _ in list(COLOURS.values())[:7])
# Of several runs, in order.
SERIES = [COLOURS[name][0] for name in ("run", "other", "good", "violet", "pink", "teal", "warn", "soft")]
DASHES = ("-", "--", ":", "-.")  # of the runs after these
FONTS = (
    'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, '
    "sans-serif"
)


def apply_style(name: str) -> None:
    """Set matplotlib's style, inside an `rc_context`; `name` makes the ids in an SVG repeatable."""
    from matplotlib import rc

    rc("svg", fonttype="none", hashsalt=name)
    rc("font", size=9)
    rc("text", color=INK)
    rc(
        "axes", titlecolor=INK, titlesize=10, titlelocation="left", titleweight="bold", grid=True,
        labelcolor=SOFT, edgecolor=LINE, facecolor=PAPER, axisbelow=True,
    )  # fmt: skip
    rc("axes.spines", top=False, right=False)
    rc("axes.formatter", useoffset=False)
    rc("grid", color=LINE, linewidth=0.7)
    rc("xtick", color=LINE, labelcolor=SOFT)
    rc("ytick", color=LINE, labelcolor=SOFT)
    rc("legend", frameon=False)
    rc("figure", facecolor=PAPER)


def save_svg(figure: Figure, file: Path) -> None:
    """Write a figure as SVG that follows the reader's light or dark theme, atomically."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    head, start, body = stream.getvalue().partition("<defs>")
    with write_atomically(file) as temporary:
        temporary.write_text(f"{head}<style>{_make_css()}</style>{start}{body}", encoding="utf-8")


def _make_css() -> str:
    """Make the CSS: fonts, and for the dark theme the dark counterpart of each light colour of matplotlib."""
    rules = "".join(
        f'[style*="{part}: {light}"] {{{part}: {dark} !important}}'
        for light, dark in COLOURS.values()
        for part in ("fill", "stroke")
    )
    return f"text {{font-family: {FONTS} !important}} @media (prefers-color-scheme: dark) {{{rules}}}"
