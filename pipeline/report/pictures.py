"""What was drawn: samples, and the figures of the paper."""

import shutil
from pathlib import Path

from PIL import Image

from pipeline.drawing.charts import Picture
from pipeline.report.source import Source

LEAST_WIDTH = 1000  # pixels; smaller pictures are enlarged, so that their pixels stay sharp
STEP_GRIDS = 4
FIGURE_5 = "rate_distortion.svg"  # stands with the numbers, not among the samples


def copy_figures(source: Source, folder: Path) -> dict[str, Picture]:
    """Copy what the figures stage drew, in its order, by file name."""
    manifest, drawn = source.read("figures"), source.place.figures
    return {
        name: copy(drawn / name, folder, manifest["captions"][name]) for name in manifest.get("order", [])
    }


def copy_samples(source: Source, figures: dict[str, Picture], folder: Path) -> list[Picture]:
    """Return the figures, with the first samples where none shows them; none without samples."""
    if "grid" not in source.files:
        return []
    if "samples.png" in figures:
        return list(figures.values())
    return [copy(source.files["grid"], folder, "The first samples, not selected"), *figures.values()]


def copy_step_grids(source: Source, folder: Path) -> list[Picture]:
    """Copy a few of the grids that training drew, the first and the last among them."""
    grids = source.step_grids
    if not grids:
        return []
    chosen = sorted({round(i * (len(grids) - 1) / (STEP_GRIDS - 1)) for i in range(STEP_GRIDS)})
    return [copy(grids[place], folder, f"Step {int(grids[place].stem):,}") for place in chosen]


def copy(file: Path, folder: Path, caption: str) -> Picture:
    """Copy a picture into the page's folder: a PNG at least LEAST_WIDTH wide, each of its pixels repeated."""
    if file.suffix == ".svg":
        shutil.copyfile(file, folder / file.name)
    else:
        with Image.open(file) as image:
            times = -(-LEAST_WIDTH // image.width)
            size = (times * image.width, times * image.height)
            image.resize(size, Image.Resampling.NEAREST).save(folder / file.name)
    return Picture(file.name, caption)
