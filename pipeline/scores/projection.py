"""A fixed random projection: features for images without labels.

The images pass fixed random filters and a rectifier before they are projected. Without these, features would
be linear in the pixels, and a Gaussian with the images' mean and covariance would score as perfect.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm.images import from_uint8
from ddpm.rng import Stream, normal
from pipeline.store.files import hash_file, write_atomically
from pipeline.store.run import Place

FEATURES = 64
FILTERS = 64
POOLED_SIDE = 4
SEED = 0


class Projection(nn.Module):
    """uint8 images (N,C,H,W) -> features (N, 64), float32, alone in a tuple. Weights are a function of C alone."""

    filters: Tensor
    matrix: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("filters", _normals(0, FILTERS, channels, 3, 3))
        self.register_buffer("matrix", _normals(1, FEATURES, FILTERS * POOLED_SIDE**2))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = F.relu(F.conv2d(from_uint8(images), self.filters, padding=1))
        x = F.adaptive_avg_pool2d(x, POOLED_SIDE)  # (N, 64, 4, 4)
        return (F.linear(x.flatten(1), self.matrix),)


def _normals(step: int, rows: int, *shape: int) -> Tensor:
    """Draw (rows, *shape) of variance 1 / elements of a row."""
    draw = normal(SEED, Stream.PROJECTION, step, torch.arange(rows), shape)
    scale: float = draw[0].numel() ** 0.5
    return draw / scale


def write_weights(path: Path, channels: int) -> tuple[Path, str]:
    """Write the projection for images of so many channels, unless it is there; return the file and its sha256."""
    if not path.exists():
        with write_atomically(path) as temporary:
            save_file(Projection(channels).state_dict(), temporary)
    return path, hash_file(path)


def find_weights(place: Place) -> tuple[Path, str]:
    return write_weights(place.projection, place.experiment.data.channels)


def load(path: Path) -> Projection:
    state = load_file(path)
    net = Projection(state["filters"].shape[1])
    net.load_state_dict(state)
    return net.eval()
