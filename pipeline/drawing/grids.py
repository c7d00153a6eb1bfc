"""Grids of images as PNG files."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from ddpm.images import grid
from pipeline.store.files import atomic_file

CELL_PIXELS = 64  # smaller images are enlarged


def save_grid(images: Tensor, columns: int, file: Path) -> None:
    """uint8 images (N,C,H,W) on the CPU, row by row, as one PNG, atomically."""
    picture = grid(images, columns, max(1, CELL_PIXELS // images.shape[-1]))
    with atomic_file(file) as temporary:
        Image.fromarray(picture.numpy()).save(temporary, format="PNG")
