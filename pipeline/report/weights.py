"""EMA and raw weights side by side: the field's most common mistake, in numbers."""

from __future__ import annotations

from pipeline.report import paper
from pipeline.report.page import Block, Table, Text
from pipeline.report.scores import cell
from pipeline.report.source import Source, missing

COLUMNS = {"fid": "FID", "is_mean": "IS", "nll_bpd": "NLL, bits/dim"}
NAMES = {"ema": "EMA", "raw": "raw"}


def section(source: Source) -> list[Block]:
    """Nothing unless both were asked for."""
    if not source.experiment.evaluate.beside or not source.metrics["scores"]:
        return []
    found = source.by_weights
    if len(found) < 2:
        return missing(source, "The other weights are not scored yet", "evaluate")
    columns = [key for key in COLUMNS if any(key in scores for scores in found.values())]
    rows = [[NAMES[name], *(cell(scores, key) for key in columns)] for name, scores in found.items()]
    if "fid" in columns:
        for name, its in paper.AUTHORS_WEIGHTS.items():
            cells = [f"{its:.2f}" if key == "fid" else "–" for key in columns]
            rows.append([f"authors' CIFAR-10 weights, {NAMES[name]}", *cells])
    used = next(iter(found)) == source.metrics["protocol"].get("weights")
    said = (
        "Raw weights sample worse than their moving average. Scoring the wrong ones is the field's most common "
        "mistake: through torch-fidelity the authors' own weights at step 790,000 have an FID of 12.1 raw and 3.2 "
        "averaged."
    )
    return [Table(("", *(COLUMNS[key] for key in columns)), rows, frozenset({0 if used else 1})), Text(said)]
