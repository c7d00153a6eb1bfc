"""docs/results/schedules-dropout.md, its JSON twin and its picture: what schedule and dropout change on CIFAR-10.

python docs/results/schedules_dropout.py [SWEEP]     SWEEP is a folder sweeps/NAME of a storage root; without it, the
                                                     page is made from the JSON that was committed

The seeds of all settings together tell how much a score moves by the seed alone. From it come the intervals of the
means, by Student's t. Settings with the same seed begin with the same weights and see the same images and noise, so
that what a seed adds to all of them is left out of the intervals of their differences.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import t as student

from pipeline.scores.metrics import METRICS, format_number
from pipeline.store.files import read_json
from pipeline.store.run import LEADERBOARD

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
PICTURE = HERE.parent / "pictures" / "schedules-dropout.svg"
SCHEDULES, DROPOUTS = ("const", "linear", "quad", "cosine"), (0.1, 0.4)
SETTINGS = list(product(SCHEDULES, DROPOUTS))
SHOWN = ("nll_bpd", "fid", "rate_bpd", "distortion_bpd", "rmse")
TESTED = ("nll_bpd", "fid")  # of these, differences
Values = dict[tuple[str, float], list[float]]
WORDS = """

**The schedule can be told apart.** `const` is far the worst: it begins at beta = 0.02, so the last step of a chain
starts from noise of 18 grey levels, and its distortion alone costs more than the whole bound of any other. `quad`
and `cosine` have a lower NLL and a lower FID than `linear`; between these two the NLL speaks for `cosine`, the FID
for neither. All of this holds after 8,000 images; the paper chose its schedule for 102,400,000. Rates and
distortions of different schedules are not comparable by themselves, as the decoder's step lies at another noise
level; their sum is.

**Dropout cannot.** With 0.4 the NLL is higher in seven of eight pairs, by 0.044 bits/dim in the mean, and its
interval reaches zero. The FID says nothing about it.

**The seed matters more than dropout.** A run's NLL moves by 0.072 from seed to seed, five times the standard error
of its own bound (0.015, over test images), and its FID by 2.4, ten times its own (0.2, over samples). The errors
that a single run carries do not contain this. A ranking by one seed can be wrong by as much.

![The trials in MLflow, the best first](../pictures/schedules-dropout-mlflow.png)

The link that `ddpm ui` prints for the study. Trained and scored by commit `05bdd17`.
"""  # what the numbers say, written after they were seen


def main(sweep: Path | None) -> None:
    file = HERE / "schedules-dropout.json"
    if sweep:
        found = read_json(sweep / LEADERBOARD, dict)
        file.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(file.read_text())
    done = [trial for trial in found["trials"] if trial["state"] == "finished"]
    values = {name: collect(done, name) for name in SHOWN}
    draw_lines(done)
    (HERE / "schedules-dropout.md").write_text(format_page(found, done, values))


def collect(trials: list[dict[str, Any]], metric: str) -> Values:
    """Return the scores of each setting, by seed."""
    found: Values = {setting: [] for setting in SETTINGS}
    for trial in sorted(trials, key=lambda trial: trial["swept"].get("seed", 0)):
        swept = trial["swept"]
        found[swept["diffusion.beta_schedule"], swept["model.dropout"]].append(trial["scores"][metric])
    return found


def pool(values: Values, paired: bool) -> tuple[float, int]:
    """Return the standard deviation of one score over seeds, from all settings, and its degrees of freedom.

    paired: without what a seed adds to all settings alike, which a difference of two settings does not have.
    """
    scores = np.array([values[setting] for setting in SETTINGS])  # each has all seeds
    rest = scores - scores.mean(axis=1, keepdims=True)
    rows, seeds = scores.shape
    if paired:
        rest -= rest.mean(axis=0)
    freedom = (rows - paired) * (seeds - 1)
    return float(np.sqrt(np.sum(rest**2) / freedom)), freedom


def find_half_width(values: Values, *counts: int) -> float:
    """Return half of the 95 % interval of a mean of so many scores, or of the difference of two such means."""
    deviation, freedom = pool(values, paired=len(counts) == 2)
    return float(student.ppf(0.975, freedom)) * deviation * sum(1 / count for count in counts) ** 0.5


def format_difference(name: str, values: Values, first: list[tuple], second: list[tuple]) -> str:
    """Say how much higher the mean of the first settings is than that of the second; bold if it is surely not zero."""
    (a, b) = ([score for setting in settings for score in values[setting]] for settings in (first, second))
    value, half = float(np.mean(a) - np.mean(b)), find_half_width(values, len(a), len(b))
    cell = format_number(value, half, METRICS[name].digits, "+")
    return f"**{cell}**" if abs(value) > half else cell


def format_page(found: dict[str, Any], done: list[dict[str, Any]], values: dict[str, Values]) -> str:
    hours = sum(trial["seconds"] for trial in done) / 3600
    freedom = pool(values["nll_bpd"], False)[1]
    deviations = ", ".join(f"{METRICS[name].title} {pool(values[name], False)[0]:.3f}" for name in TESTED)
    lines = [
        "# Schedules and dropout on CIFAR-10", "",
        "Written by `python docs/results/schedules_dropout.py` from [schedules-dropout.json](schedules-dropout.json),",
        "the leaderboard of `ddpm sweep cifar10_tiny data.path=FOLDER_OR_ARCHIVE cluster.workers=0`.",
        f"{len(done)} trials: the paper's network at a quarter of its width, 8,000 images seen by each,",
        f"{hours:.1f} hours of two shared CPU cores beside other work.", "",
        f"Protocol: {found['protocol']}. The loss cannot be compared over schedules, the NLL can.", "",
        "![Parallel coordinates: schedule, dropout, rate, distortion, NLL, FID](../pictures/schedules-dropout.svg)", "",
        f"| schedule | dropout | {' | '.join(METRICS[name].title for name in SHOWN)} | NLL of each seed |",
        f"| --- | --- | {' | '.join('---' for _ in SHOWN)} | --- |",
    ]  # fmt: skip
    for setting in sorted(SETTINGS, key=lambda setting: np.mean(values["nll_bpd"][setting])):
        cells = [str(part) for part in setting]
        for name in SHOWN:
            scores = values[name][setting]
            half = find_half_width(values[name], len(scores))
            cells.append(format_number(float(np.mean(scores)), half, METRICS[name].digits))
        seeds = ", ".join(f"{score:.3f}" for score in values["nll_bpd"][setting])
        lines.append(f"| {' | '.join(cells)} | {seeds} |")
    lines += [
        "", "± is half of the 95 % interval of the mean over seeds, from the spread of the seeds of all settings",
        f"together ({freedom} degrees of freedom; standard deviation of a run: {deviations}).", "",
        "## What can be told apart", "",
        "Differences of means with their 95 % intervals, each by itself; bold where zero lies outside. What a seed",
        "adds to all settings alike is left out: runs with the same seed begin with the same weights and see the same",
        "noise.", "",
        "| | NLL, bits/dim | FID |", "| --- | --- | --- |",
    ]  # fmt: skip
    low, high = ([(schedule, dropout) for schedule in SCHEDULES] for dropout in DROPOUTS)
    rows = {f"dropout 0.4 minus 0.1, {a[0]}": ([b], [a]) for a, b in zip(low, high, strict=True)}
    rows["dropout 0.4 minus 0.1, all schedules"] = high, low
    for one, other in (("const", "linear"), ("quad", "linear"), ("cosine", "linear"), ("cosine", "quad")):
        pair = tuple([(name, dropout) for dropout in DROPOUTS] for name in (one, other))
        rows[f"{one} minus {other}, both dropouts"] = pair
    for label, pair in rows.items():
        lines.append(
            f"| {label} | {' | '.join(format_difference(name, values[name], *pair) for name in TESTED)} |"
        )
    return "\n".join(lines) + WORDS


def draw_lines(done: list[dict[str, Any]]) -> None:
    """Draw a line for each trial through its settings and its scores; const's, which lie far off, are cut off."""
    names = ("rate_bpd", "distortion_bpd", "nll_bpd", "fid")
    schedules = [SCHEDULES.index(trial["swept"]["diffusion.beta_schedule"]) for trial in done]
    dropouts = [DROPOUTS.index(trial["swept"]["model.dropout"]) for trial in done]
    columns: list[list[float]] = [[number / 3 for number in schedules], [*map(float, dropouts)]]
    marks = [
        *((0, number / 3, name) for number, name in enumerate(SCHEDULES)),
        (1, 0, "0.1"),
        (1, 1, "0.4, dashed"),
    ]
    for x, name in enumerate(names, 2):
        scores = np.array([trial["scores"][name] for trial in done])
        others = scores[np.array(schedules) > 0]
        low, high = min(others), max(others)
        columns.append(np.clip((scores - low) / (high - low), -0.15, 1.15).tolist())
        marks += [
            (x, y, format_number(score, None, METRICS[name].digits)) for y, score in ((0, low), (1, high))
        ]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for line in zip(*columns, strict=True):
        axes.plot(line, color=f"C{round(line[0] * 3)}", linestyle="--" if line[1] else "-", alpha=0.8)
    for x, y, text in marks:
        axes.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(6), ["schedule", "dropout", *(METRICS[name].title for name in names)])
    axes.set_yticks([])
    axes.grid(axis="x")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
