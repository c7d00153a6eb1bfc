"""What a run scored, in a sentence and beside other numbers."""

from pipeline import config
from pipeline.report import paper
from pipeline.report.page import format_value
from pipeline.report.source import Source
from pipeline.scores.metrics import FIRM, HEADLINE


def compare_with_linear(source: Source) -> str:
    """Write both numbers where a network of CIFAR-10 does not beat the best linear denoiser, which needs no
    training; '' where it does, or where nothing says so.

    The line holds for the paper's noise schedule, and its rate for fixedlarge: another variance costs other bits.
    """
    d, scores = source.experiment.diffusion, source.scores
    if not (source.is_cifar10 and paper.has_its_schedule(d) and "rmse" in scores):
        return ""
    names = {"rmse": "RMSE"}
    if source.protocol.get("nll_variance", d.variance) == "fixedlarge":
        names = {"rate_bpd": "rate", **names}
    if all(scores[key] < paper.LMMSE[key] for key in names):
        return ""
    ours, line = (
        ", ".join(f"{name}{FIRM}{values[key]:.4f}" for key, name in names.items())
        for values in (scores, paper.LMMSE)
    )
    return f"{ours}, against {line}"


def write_headline(source: Source) -> str:
    """Write the scores, and what they are beside the paper's or a Gaussian's."""
    scores, parts = source.scores, []
    for metric in HEADLINE:
        if metric.name in scores:
            parts.append(f"{metric.heading}{FIRM}{metric.format_from(scores)} {metric.unit}".rstrip())
    if source.is_comparable:
        printed = source.row.scores if source.row else {}
        beside = [f"{m.heading} {printed[m.name]}" for m in HEADLINE if m.name in printed]
        tail = ", ".join(beside).replace(" ", FIRM) or "which prints no score for this objective"
        return f"{', '.join(parts)}, by the paper's protocol ({tail})"
    gaussian = source.metrics["reference_points"].get("gaussian", {}).get("fid")
    if gaussian and "fid" in scores:
        share = scores["fid"] / gaussian
        times = f"{share:.0%} of" if share < 1 else f"{share:.1f} times"
        parts[0] += f" ({times} a Gaussian's {gaussian:,.1f})"
    reason = ". Not comparable with the paper's row, for the reasons below" if source.is_cifar10 else ""
    return ", ".join(parts) + reason


def list_notes(source: Source) -> dict[str, str]:
    """Map each headline score to the numbers that stand beside it on its card."""
    points = source.metrics["reference_points"]
    printed = source.row.scores if source.row else {}
    notes = {}
    for metric in HEADLINE:
        parts = [f"paper {printed[metric.name]}"] if metric.name in printed else []
        for point, name in (("test", "test images"), ("gaussian", "Gaussian")):
            if not source.is_comparable and metric.name in points.get(point, {}):
                parts.append(f"{name} {metric.format_from(points[point])}")
        notes[metric.name] = " · ".join(parts) or "upper bound, test images"
    return notes


def list_departures(source: Source) -> list[str]:
    """List the settings that are not the paper's, whatever the objective, with both values."""
    tree, found = config.to_dict(source.experiment), []
    for name, recipe in paper.RECIPE.items():
        if name == "train" and source.experiment.published.weights:
            continue
        ours = tree[name] if tree[name].get("name") == recipe.get("name") else {"name": tree[name]["name"]}
        found += [
            f"`{name}.{key}` is {format_value(ours[key])}, not {format_value(value)}"
            for key, value in recipe.items()
            if key in ours and ours[key] != value
        ]
    return found
