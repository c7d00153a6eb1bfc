"""A fixed random projection: features for images without labels.

The images pass fixed random filters and a rectifier before they are projected. Without these, features would
be linear in the pixels, and a Gaussian with the images' mean and covariance would score as perfect.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ddpm.images import from_uint8
from ddpm.rng import Stream, draw_normal
from pipeline.store.arrays import is_unit_done
from pipeline.store.files import hash_file, require_sealed, write_atomically, write_manifest
from pipeline.store.run import Place
from pipeline.store.tensors import save_tensors

FEATURES = 64
FILTERS = 64
POOLED_SIDE = 4
SEED = 0


class Projection(nn.Module):
    """The network from uint8 images (N,C,H,W) to a tuple of features (N, 64), float32; C alone sets its weights."""

    filters: Tensor
    matrix: Tensor

    def __init__(self, channels: int):
        super().__init__()
        shapes = {"filters": (FILTERS, channels, 3, 3), "matrix": (FEATURES, FILTERS * POOLED_SIDE**2)}
        for step, (name, (rows, *shape)) in enumerate(shapes.items()):
            draw = draw_normal(SEED, Stream.PROJECTION, step, torch.arange(rows), tuple(shape))
            self.register_buffer(name, draw / draw[0].numel() ** 0.5)  # variance 1 / elements of a row

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = F.relu(F.conv2d(from_uint8(images), self.filters, padding=1))
        x = F.adaptive_avg_pool2d(x, POOLED_SIDE)  # (N, 64, 4, 4)
        return (F.linear(x.flatten(1), self.matrix),)


def find_weights(place: Place) -> tuple[Path, str]:
    """Return the file of the projection for the run's images, written if need be, and its sha256."""
    if not is_unit_done(place.projection, require_sealed):
        with write_atomically(place.projection) as temporary:
            save_tensors(Projection(place.experiment.data.channels).state_dict(), temporary)
        write_manifest(place.projection.parent, [place.projection.name])
    return place.projection, hash_file(place.projection)


def load_projection(path: Path) -> Projection:
    state = load_file(path)
    net = Projection(state["filters"].shape[1])
    net.load_state_dict(state)
    return net.eval()
