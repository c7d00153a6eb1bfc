"""Grids of images as PNG files."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.store.files import require_regular_file, write_atomically

CELL_PIXELS = 64  # smaller images are enlarged


def make_grid(images: Tensor, columns: int) -> Image.Image:
    """Put images, uint8 (N,C,H,W) on the CPU, into one picture, row by row, two pixels apart on white."""
    scale = max(1, CELL_PIXELS // images.shape[-1])
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    n, _, h, w = images.shape
    rows = -(-n // columns)
    tiles = images.new_full((rows * columns, 3, h + 2, w + 2), 255)
    tiles[:n, :, 1:-1, 1:-1] = images  # one channel becomes three
    picture = tiles.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * (h + 2), -1, 3)
    return Image.fromarray(picture.numpy())


def save_grid(images: Tensor, columns: int, file: Path) -> None:
    """Write images, uint8 (N,C,H,W) on the CPU, as a grid into one PNG, atomically; the last row may be short."""
    with write_atomically(file) as temporary:
        make_grid(images, columns).save(temporary, format="PNG")


def save_animation(frames: Tensor, columns: int, file: Path) -> None:
    """Write grids of images, uint8 (frames,N,C,H,W), as an endless GIF that pauses on the last one, atomically."""
    first, *others = (make_grid(images, columns) for images in frames)
    milliseconds = [60] * len(others) + [3000]
    with write_atomically(file) as temporary:
        first.save(
            temporary, format="GIF", save_all=True, append_images=others, loop=0, duration=milliseconds
        )  # fmt: skip


def require_picture(file: Path) -> Path:
    """Return the path of a PNG. Raises PipelineError if one of its checksums is wrong."""
    try:
        with Image.open(require_regular_file(file), formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise PipelineError(f"{file} is damaged ({error}) and skipped") from error
    return file
