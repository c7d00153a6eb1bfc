"""Colours and fonts of charts and pages, light and dark."""

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
CHARTS = {  # matplotlib's settings
    "svg.fonttype": "none", "font.size": 9, "text.color": INK, "figure.facecolor": PAPER, "legend.frameon": False,
    "axes.titlecolor": INK, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.grid": True, "axes.labelcolor": SOFT, "axes.edgecolor": LINE, "axes.facecolor": PAPER, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False,
    "grid.color": LINE, "grid.linewidth": 0.7, "xtick.color": LINE, "xtick.labelcolor": SOFT, "ytick.color": LINE,
    "ytick.labelcolor": SOFT,
}  # fmt: skip
# For the reader's dark theme, the dark counterpart of each light colour of matplotlib.
_DARK = "".join(
    f'[style*="{part}: {light}"] {{{part}: {dark} !important}}'
    for light, dark in COLOURS.values()
    for part in ("fill", "stroke")
)
CHARTS_CSS = f"text {{font-family: {FONTS} !important}} @media (prefers-color-scheme: dark) {{{_DARK}}}"
