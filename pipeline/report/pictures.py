"""The pictures that other stages drew, copied to the page: samples, the figures of the paper, grids of training."""

import shutil
from pathlib import Path

from PIL import Image

from pipeline.drawing.charts import Picture
from pipeline.report.run_files import RunFiles

LEAST_WIDTH = 1000  # pixels; smaller pictures are enlarged, so that their pixels stay sharp
STEP_GRIDS = 4
FIGURE_5 = (
    "rate_distortion.svg"  # left out: the page draws its panels beside the numbers, with the paper's points
)


def copy_figures(run: RunFiles, folder: Path) -> list[Picture]:
    """Copy the figures in their order; before them the first samples where no figure shows them."""
    manifest = run.read_content("figures")
    names = [name for name in manifest.get("order", []) if name != FIGURE_5]
    pictures = [copy_picture(run.place.figures / name, folder, manifest["captions"][name]) for name in names]
    if "samples.png" not in names and "grid" in run.paths:
        pictures.insert(0, copy_picture(run.paths["grid"], folder, "The first samples, not selected"))
    return pictures


def copy_step_grids(run: RunFiles, folder: Path) -> list[Picture]:
    """Copy a few of the grids that training drew, the first and the last among them."""
    last = len(run.step_grids) - 1
    numbers = sorted({round(i * last / (STEP_GRIDS - 1)) for i in range(STEP_GRIDS)}) if last >= 0 else []
    grids = [run.step_grids[number] for number in numbers]
    return [copy_picture(grid, folder, f"Step {int(grid.stem):,}") for grid in grids]


def copy_picture(file: Path, folder: Path, caption: str) -> Picture:
    """Copy a picture into the page's folder: a PNG enlarged by a whole factor to LEAST_WIDTH at least."""
    if file.suffix == ".svg":
        shutil.copyfile(file, folder / file.name)
    else:
        with Image.open(file) as image:
            times = -(-LEAST_WIDTH // image.width)
            size = (times * image.width, times * image.height)
            image.resize(size, Image.Resampling.NEAREST).save(folder / file.name)
    return Picture(file.name, caption)
