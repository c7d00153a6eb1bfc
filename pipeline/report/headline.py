"""The scores of a run in sentences, and the numbers that stand beside them."""

from pipeline import config
from pipeline.report import paper
from pipeline.report.page import format_value
from pipeline.report.run_files import RunFiles
from pipeline.scores.metrics import FIRM, HEADLINE, METRICS


def compare_with_linear_denoiser(run: RunFiles) -> str:
    """Return the numbers of a CIFAR-10 network and of the best linear denoiser where the network is not better.

    '' otherwise. Its RMSE holds for the paper's noise schedule, its rate only with the variance fixedlarge.
    """
    d, scores = run.experiment.diffusion, run.scores
    if not (run.is_cifar10 and paper.has_paper_schedule(d) and "rmse" in scores):
        return ""
    names = {"rmse": "RMSE"}
    if run.protocol.get("nll_variance", d.variance) == "fixedlarge":
        names = {"rate_bpd": "rate", **names}
    if all(scores[key] < paper.LMMSE[key] for key in names):
        return ""
    ours, line = (
        ", ".join(f"{name}{FIRM}{values[key]:.4f}" for key, name in names.items())
        for values in (scores, paper.LMMSE)
    )
    return f"{ours}, against {line}"


def describe_scores(run: RunFiles) -> str:
    """Return the scores as a sentence, with the paper's scores or the Gaussian baseline's."""
    scores, parts = run.scores, []
    metrics = [m for m in (*HEADLINE, METRICS["train_nll_bpd"]) if m.name in scores]
    for metric in metrics:
        parts.append(f"{metric.heading}{FIRM}{metric.format_score(scores)} {metric.unit}".rstrip())
    if run.is_comparable:
        printed = run.paper_row.scores if run.paper_row else {}
        beside = [f"{m.heading} {printed[m.name]}" for m in metrics if m.name in printed]
        tail = ", ".join(beside).replace(" ", FIRM) or "which prints no score for this objective"
        return f"{', '.join(parts)}, by the paper's protocol ({tail})"
    gaussian = run.metrics["reference_points"].get("gaussian", {}).get("fid")
    if gaussian and "fid" in scores:
        share = scores["fid"] / gaussian
        times = f"{share:.0%} of" if share < 1 else f"{share:.1f} times"
        parts[0] += f" ({times} a Gaussian's {gaussian:,.1f})"
    reason = ". Not comparable with the paper's row, for the reasons below" if run.is_cifar10 else ""
    return ", ".join(parts) + reason


def list_comparison_numbers(run: RunFiles) -> dict[str, str]:
    """Return for each headline score the numbers that are shown beside it for comparison."""
    points = run.metrics["reference_points"]
    printed = run.paper_row.scores if run.paper_row else {}
    notes = {}
    for metric in HEADLINE:
        parts = [f"paper {printed[metric.name]}"] if metric.name in printed else []
        for point, name in (("test", "test images"), ("gaussian", "Gaussian")):
            if not run.is_comparable and metric.name in points.get(point, {}):
                parts.append(f"{name} {metric.format_score(points[point])}")
        notes[metric.name] = " · ".join(parts) or "upper bound, test images"
    return notes


def list_differences_from_paper(run: RunFiles) -> list[str]:
    """List the settings that differ from the paper's, with both values; the objective is not compared."""
    tree, found = config.to_dict(run.experiment), []
    for name, recipe in paper.RECIPE.items():
        if name == "train" and not run.experiment.is_trained:
            continue
        ours = tree[name] if tree[name].get("name") == recipe.get("name") else {"name": tree[name]["name"]}
        found += [
            f"`{name}.{key}` is {format_value(ours[key])}, not {format_value(value)}"
            for key, value in recipe.items()
            if key in ours and ours[key] != value
        ]
    return found
