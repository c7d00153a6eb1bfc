"""What was drawn: samples, and the figures of the paper."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image

from pipeline.report import plots
from pipeline.report.page import Block, Picture, Pictures, Text
from pipeline.report.source import Source, missing

LEAST_WIDTH = 1000  # pixels; smaller pictures are enlarged, so that their pixels stay sharp
RATE_DISTORTION = "rate_distortion.svg"  # stands with the numbers, not among the samples


def section(source: Source) -> list[Block]:
    if "grid" not in source.files:
        return missing(source, "There are no samples yet", "sample")
    drawn = figures(source)
    shown = [picture for name, picture in drawn.items() if name != RATE_DISTORTION]
    if "samples.png" not in drawn:
        shown.insert(
            0, Picture("grid.png", enlarged(source.files["grid"]), "The first samples, not selected")
        )
    blocks: list[Block] = [Pictures(shown, wide=True)]
    if "figures" not in source.files:
        blocks += missing(source, "There are no figures of the paper yet", "figures")
    left_out = source.read("figures").get("skipped", {})
    if left_out:
        reasons = "; ".join(f"`{name}`, because {why}" for name, why in left_out.items())
        blocks.append(Text(f"Not drawn: {reasons}."))
    return blocks + _class_shares(source)


def figures(source: Source) -> dict[str, Picture]:
    """What the figures stage drew, in its order, by file name."""
    manifest = source.read("figures")
    captions = manifest.get("captions", {})
    pictures = {}
    for name in manifest.get("order", sorted(captions)):
        file = source.files["figures"].parent / name
        data = file.read_bytes() if file.suffix == ".svg" else enlarged(file)
        pictures[name] = Picture(name, data, captions[name])
    return pictures


def _class_shares(source: Source) -> list[Block]:
    shares = source.metrics.get("class_shares")
    if not shares:
        return []
    said = f"Each class holds {min(shares):.1%} to {max(shares):.1%} of the samples, as the classifier sees them."
    percent = [100 * share for share in shares]
    return [Pictures([plots.bars("classes", "Samples by class, %", percent, x="class", caption=said)])]


def enlarged(path: Path) -> bytes:
    """PNG of at least LEAST_WIDTH pixels, each of the original's repeated."""
    with Image.open(path) as image:
        times = -(-LEAST_WIDTH // image.width)
        if times == 1:
            return path.read_bytes()
        stream = BytesIO()
        image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST).save(
            stream, "PNG"
        )
        return stream.getvalue()
