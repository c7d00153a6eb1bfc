"""docs/results/ladder.json and ladder.md: the points of the ladder, their fit, and its prediction for the paper's run.

python docs/results/ladder.py [RUN ...]      run directories add their points to those that were committed

A point is a width after so many images, scored on all 10,000 test images. Rate and distortion are fitted apart, each by
E + A N^-alpha + B S^-beta for N parameters and S images seen, weighted by the errors; E is no less than what arithmetic
leaves to any network. Its interval comes from points drawn with replacement, all moved together by the error of the
test images, which they share. The longest run of each width is predicted from the others before the fit is trusted.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from pipeline.engine.find import read_place
from pipeline.store.checkpoint import create_network
from pipeline.store.files import read_json

HERE = Path(__file__).parent
PAPER = {"parameters": 35_746_307, "images": 102_400_000}
# Of cifar10_short on a GPU. All but 15,000, where the same fit is read, were written down before it was trained.
SHORT_STEPS = (5_000, 10_000, 15_000, 20_000, 30_000)
SHORT = {f"cifar10_short_{steps}": {**PAPER, "images": steps * 128} for steps in SHORT_STEPS}
# The points that two CPU cores scored, from which the others were predicted: width and images seen.
FIRST = {(32, 8_000), (32, 16_000), (32, 64_000), (48, 8_000), (48, 16_000), (48, 32_000)}
PARAMETERS = {32: 2_245_763, 48: 5_041_347, 64: 8_952_067}
LADDER = {
    f"width_{width}_{images}": {"parameters": count, "images": images}
    for width, count in PARAMETERS.items()
    for images in (8_000 * 2**k for k in range(6))
    if (width, images) not in FIRST
}
TARGETS = {"prediction": PAPER} | SHORT | LADDER
PUBLISHED = {"nll_bpd": 3.75, "rate_bpd": 1.78, "distortion_bpd": 1.97}  # Sec. 4.3 and Table 1
FLOORS = {
    "rate_bpd": 0.48642,
    "distortion_bpd": 1.29600,
}  # of fixedlarge and 8-bit pixels, T = 1000, the linear schedule
WIDTHS, LENGTHS = 2, 3  # the fewest for a fit
RESAMPLES = 400
Point = dict[str, Any]


def main(runs: list[str]) -> None:
    file = HERE / "ladder.json"
    known = json.loads(file.read_text())["points"] if file.exists() else []
    points = {(point["width"], point["images"]): point for point in known}
    for point in (point for run in runs for point in read_points(Path(run))):
        key = point["width"], point["images"]
        if key not in points or key not in FIRST:  # what the predictions were made from stays
            points[key] = point
    rows = [points[key] for key in sorted(points)]
    first = [points[key] for key in sorted(FIRST & points.keys())]
    found = {"points": rows, "paper": PAPER | PUBLISHED, **predict(rows), "from_small": predict(first)}
    file.write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "ladder.md").write_text(format_page(found))


def read_points(path: Path) -> Iterator[Point]:
    """Yield the points of a run: its evaluations of all test images."""
    place = read_place(path.absolute())
    experiment = place.experiment
    count = sum(tensor.numel() for tensor in create_network(experiment, "meta").parameters())
    for file in sorted(place.path.glob("evaluation/*/metrics.json")):
        results = read_json(file, dict[str, Any])
        scores, protocol = results["scores"], results["protocol"]
        if protocol.get("nll_images") == 10_000:
            seen = protocol["checkpoint"] * experiment.train.batch_size
            names = [name + end for name in ("nll_bpd", *FLOORS) for end in ("", "_se")]
            its = {name: scores[name] for name in names}
            yield {
                "width": experiment.model.channels, "parameters": count, "images": seen, **its, "protocol": protocol
            }  # fmt: skip


def predict(points: list[Point]) -> dict[str, Any]:
    """Return the fits and the predictions for the runs of TARGETS, or why there are none."""
    lengths = {width: [p for p in points if p["width"] == width] for width in {p["width"] for p in points}}
    whole = [width for width, its in lengths.items() if len(its) >= LENGTHS]
    if len(whole) < WIDTHS:
        return {"prediction": None, "reason": f"a fit needs {LENGTHS} lengths of {WIDTHS} widths"}
    longest = [max(its, key=lambda p: p["images"]) for its in lengths.values() if len(its) > LENGTHS]
    rest = [point for point in points if point not in longest]
    draw, at = np.random.default_rng(0), list(TARGETS.values())
    total, again = np.zeros(len(at)), np.zeros((RESAMPLES, len(at)))
    found: dict[str, Any] = {target: {} for target in TARGETS} | {"fits": {}, "residuals": {}, "longest": []}
    choices = [draw.integers(len(points), size=len(points)) for _ in range(RESAMPLES)]
    moves = draw.normal(size=RESAMPLES)  # of the shared test images
    for name, floor in FLOORS.items():
        fit = fit_law(points, name, floor)
        values = [point[name] for point in points]
        found["fits"][name] = dict(zip(("E", "A", "alpha", "B", "beta"), fit.tolist(), strict=True))
        found["residuals"][name] = (np.array(values) - compute_law(fit, points)).round(5).tolist()
        resampled = []
        for rows, move in zip(choices, moves, strict=True):
            some = [{**points[i], name: points[i][name] + move * points[i][name + "_se"]} for i in rows]
            resampled.append(compute_law(fit_law(some, name, floor, fit), at))
        values_at, drawn = compute_law(fit, at), np.array(resampled)
        for i, target in enumerate(TARGETS):
            found[target][name] = describe_interval(float(values_at[i]), drawn[:, i])
        total, again = total + values_at, again + drawn
        early = compute_law(fit_law(rest, name, floor), longest) if longest else []
        found["longest"] += [
            {"width": p["width"], "images": p["images"], "of": name, "found": p[name], "predicted": float(q)}
            for p, q in zip(longest, early, strict=True)
        ]
    for i, target in enumerate(TARGETS):
        found[target]["nll_bpd"] = describe_interval(float(total[i]), again[:, i])
    return found


def describe_interval(value: float, resampled: np.ndarray) -> dict[str, Any]:
    """Return a value with the 95 % interval of its resampled ones."""
    return {"value": round(value, 4), "interval": np.quantile(resampled, (0.025, 0.975)).round(4).tolist()}


def fit_law(points: list[Point], name: str, floor: float, start: np.ndarray | None = None) -> np.ndarray:
    """Fit E, A, alpha, B, beta by least squares weighted by the errors; without `start` from several places."""
    values = np.array([point[name] for point in points])
    errors = np.array([point[name + "_se"] for point in points])
    least = values.min() - floor
    starts = [start] if start is not None else [
        np.array([floor + share * least, least, alpha, 10.0 * least, beta])
        for share in (0.1, 0.8) for alpha in (0.1, 0.4) for beta in (0.2, 0.5)
    ]  # fmt: skip
    ends = ([floor, 0, 0.01, 0, 0.01], [floor + least, 1e3, 2, 1e4, 2])
    fits = [
        least_squares(
            lambda law: (compute_law(law, points) - values) / errors, np.clip(one, *ends), bounds=ends,
            x_scale=np.maximum(np.abs(one), 0.1), max_nfev=500,
        ) for one in starts
    ]  # fmt: skip
    best: np.ndarray = min(fits, key=lambda fit: fit.cost).x
    return best


def compute_law(law: np.ndarray, points: list[Point]) -> np.ndarray:
    """Return E + A (N / 10^6)^-alpha + B (S / 10^3)^-beta of each point."""
    n, s = (
        np.array([point[key] for point in points]) / unit
        for key, unit in (("parameters", 1e6), ("images", 1e3))
    )
    level: np.ndarray = law[0] + law[1] * n ** -law[2] + law[3] * s ** -law[4]
    return level


def format_page(found: dict[str, Any]) -> str:
    """Return the page of the ladder."""
    lines = [
        "# The ladder: small networks, and what they predict for the paper's", "",
        "Written by `python docs/results/ladder.py` from [ladder.json](ladder.json); the runs are those of "
        "`ddpm sweep ladder data.path=FOLDER_OR_ARCHIVE cluster.workers=0`. NLL, rate and distortion of the EMA in "
        "bits/dim, of all 10,000 test images (the network of width 128 in bf16), estimated with t = 0 and some draws "
        "of t for each; ± is one standard error.", "",
        "| width | parameters | images seen | draws | NLL ≤ | rate | distortion |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for p in found["points"]:
        cells = [f"{p[name]:.4f} ± {p[name + '_se']:.4f}" for name in ("nll_bpd", *FLOORS)]
        draws = p["protocol"]["nll_timesteps"]
        lines.append(
            f"| {p['width']} | {p['parameters']:,} | {p['images']:,} | {draws} | {' | '.join(cells)} |"
        )
    lines += ["", "## Prediction", ""]
    if found["prediction"] is None:
        return "\n".join([*lines, f"None yet: {found['reason']}.", ""])
    points, small, cut = found["points"], found["from_small"], len(FIRST)
    measured = {(p["parameters"], p["images"]): p for p in points}
    lines += [
        f"For {PAPER['parameters']:,} parameters and {PAPER['images']:,} images, with the 95 % interval:", "",
        f"| | from the {cut} points of two CPU cores | from all {len(points)} | paper |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, paper in PUBLISHED.items():
        lines.append(f"| {name} | {_format(small, name)} | {_format(found, name)} | {paper} |")
    lines += [
        "", "The first column was written before a GPU trained the paper's network (`cifar10_short`). What it said of "
        "that run, and what was found:", "",
        *format_predictions(small, measured, SHORT), "",
        "And of the ladder's other points, written before a GPU trained them:", "",
        *format_predictions(small, measured, LADDER),
    ]  # fmt: skip
    above = {
        name: [
            measured[at][name] > small[target][name]["interval"][1]
            for target, its in SHORT.items()
            if (at := (its["parameters"], its["images"])) in measured
        ]
        for name in PUBLISHED
    }
    missed = ", ".join(name for name, seen in above.items() if seen and all(seen)) or "none"
    more = PAPER["images"] / max(p["images"] for p in points)
    outside = [
        name for name, paper in PUBLISHED.items()
        if not found["prediction"][name]["interval"][0] <= paper <= found["prediction"][name]["interval"][1]
    ]  # fmt: skip
    alphas = ", ".join(f"{fit['alpha']:.2f}" for fit in found["fits"].values())
    lines += [
        "", f"Of `cifar10_short`, above its interval at every length, so wrong: {missed}. With all points, the "
        f"paper's value is outside the interval for: {', '.join(outside) or 'none'}.", "",
        "An interval says how far these points could move the fit; it does not say how far the law itself is wrong. "
        f"{len(points)} points determine two laws of five parameters each, and the paper's run has {more:,.0f} times "
        "as many images as the longest of them. The small networks learn at a rate of 8e-4 without its warm-up of "
        "5,000 steps; the paper's network learns by the paper's recipe, with dropout. A network cannot come below the "
        "entropy of the images, which nobody knows; the fit has only a lower bound for it. So from short runs of small "
        "networks the fit predicts too low values. In the fit of all points the exponent of the parameters (at most "
        f"2) is {alphas}: at its end it says only that the two widths do not lead to the third by one power.", "",
        "| width | images seen | " + " | ".join(f"{n}: residual" for n in FLOORS) + " |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for p, *rest in zip(points, *(found["residuals"][name] for name in FLOORS), strict=True):
        cells = " | ".join(f"{value:+.4f}" for value in rest)
        lines.append(f"| {p['width']} | {p['images']:,} | {cells} |")
    lines += [""] if found["longest"] else []
    for one in found["longest"]:
        lines.append(
            f"- {one['of']} of width {one['width']} after {one['images']:,} images: {one['found']:.4f}, predicted from "
            f"the shorter runs {one['predicted']:.4f}"
        )
    return "\n".join([*lines, ""])


def format_predictions(
    fit: dict[str, Any], measured: dict[tuple[int, int], Point], targets: dict[str, dict[str, int]]
) -> list[str]:
    """Return a table of what a fit predicts for these runs, beside what was found."""
    lines = [
        "| parameters | images seen | "
        + " | ".join(f"{name} predicted | found" for name in PUBLISHED)
        + " |",
        "| --- | --- |" + " --- | --- |" * len(PUBLISHED),
    ]
    for target, its in targets.items():
        point, cells = measured.get((its["parameters"], its["images"])), []
        for name in PUBLISHED:
            cells.append(_format(fit, name, target))
            cells.append(f"{point[name]:.3f} ± {point[name + '_se']:.3f}" if point else "")
        lines.append(f"| {its['parameters']:,} | {its['images']:,} | {' | '.join(cells)} |")
    return lines


def _format(fit: dict[str, Any], name: str, target: str = "prediction") -> str:
    low, high = fit[target][name]["interval"]
    return f"{fit[target][name]['value']:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main(sys.argv[1:])
