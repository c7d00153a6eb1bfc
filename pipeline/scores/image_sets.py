"""Image sets as files of features, and the units that write them: of shards, and of images of a Gaussian or of noise.

The features of a tar are stored under its hash and that of the extractor, so they are used again exactly where they are
valid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpm.rng import Stream, draw_normal, draw_uniform
from pipeline.compute.units import Unit, UnitKind, Worker, make_network_unit
from pipeline.errors import PipelineError
from pipeline.scores.distances import FeatureSums, sum_features
from pipeline.scores.extractors import Extractor, extract_features
from pipeline.store import files, tars
from pipeline.store.arrays import is_unit_done, read_arrays, read_unit_arrays, write_unit_arrays
from pipeline.store.keys import hash_content

BASELINE_UNIT = 500  # images
BASELINE_SEED = 0  # shared by all runs on the same data
GAUSSIAN, NOISE = 0, 1  # steps of the stream
Shape = tuple[int, int, int]


def hash_shards(shards: list[tars.Shard]) -> str:
    return hash_content([shard.sha256 for shard in shards])


@dataclass(frozen=True)
class ImageSet:
    """The features of n images as files in order, each with the unit that makes it; the last file may hold more."""

    n: int
    units: dict[Path, Unit]

    def list_missing(self) -> list[Unit]:
        return [unit for file, unit in self.units.items() if not is_unit_done(file)]

    def read_chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield features and logits, file by file, up to the n-th image."""
        left = self.n
        for file in self.units:
            arrays = read_unit_arrays(file)
            features, logits = arrays["features"][:left], arrays["logits"][:left]
            left -= len(features)
            yield features, logits

    def read_features(self) -> np.ndarray:
        """Read all features, (n, d) float32. Raises PipelineError if they are fewer than n."""
        features = np.concatenate([part for part, _ in self.read_chunks()])
        if len(features) != self.n:
            raise PipelineError(f"{len(features)} images are there, but {self.n} are to be scored")
        return features

    def sum_features(self) -> FeatureSums:
        return sum_features(self.read_chunks(), self.n)


def make_shard_set(
    extractor: Extractor, shards: list[tars.Shard], shape: Shape, folder: Path, n: int | None = None
) -> ImageSet:
    """Make the set of the first n images (None: all) of these shards; its features are written to `folder`."""
    units = dict[Path, Unit]()
    for shard in shards:
        file = folder / extractor.name / f"{shard.sha256[:16]}.npz"
        args, name = (extractor, shard, shape), f"features of {shard.name}"
        units |= make_network_unit(UnitKind.FEATURES, write_shard_features, args, file, name, shard.count)
    return ImageSet(sum(unit.images for unit in units.values()) if n is None else n, units)


def make_baseline_set(
    extractor: Extractor, n: int, shape: Shape, folder: Path, pixels: Path | None
) -> ImageSet:
    """Make the set of n images of the Gaussian in the file `pixels`, or of uniform noise if that is None."""
    units, kind = dict[Path, Unit](), pixels.stem if pixels else "noise"
    for start in range(0, n, BASELINE_UNIT):
        stop = min(start + BASELINE_UNIT, n)
        file = folder / extractor.name / f"{kind}-{start}-{stop}.npz"
        args, name = (extractor, pixels, start, stop, shape), f"features of {kind} {start}-{stop - 1}"
        units |= make_network_unit(UnitKind.FEATURES, write_baseline_features, args, file, name, stop - start)
    return ImageSet(n, units)


def write_shard_features(
    ctx: Worker, extractor: Extractor, shard: tars.Shard, shape: Shape, file: Path
) -> None:
    """Write the features of one shard (body of a unit). Raises PipelineError if the shard has changed.

    It reads no manifest, since the first shards of samples are processed before all are drawn.
    """
    if not shard.path.is_file() or files.hash_file(shard.path) != shard.sha256:
        raise PipelineError(f"{shard.path} is missing or does not match its sha256; {files.REMEDY}")
    try:
        records = tars.read_records(shard.path, shard.count)
        images = [tars.decode_png(record.png) for record in records]
    except (ValueError, OSError) as error:
        raise PipelineError(f"{shard.path} cannot be scored ({error}); {files.REMEDY}") from error
    if others := sorted({image.shape for image in images} - {shape}):
        raise PipelineError(
            f"{shard.path} holds images of shape (C, H, W) = {others[0]} where {shape} is scored; {files.REMEDY}"
        )
    features, logits = extract_features(extractor, np.stack(images), ctx.device)
    write_unit_arrays(file, features=features, logits=logits)


def write_baseline_features(
    ctx: Worker, extractor: Extractor, pixels: Path | None, start: int, stop: int, shape: Shape, file: Path
) -> None:  # fmt: skip
    if pixels is None:
        images = draw_noise_images(start, stop, shape)
    else:
        arrays = read_arrays(pixels)
        images = draw_gaussian_images(arrays["mean"], arrays["factor"], start, stop, shape)
    features, logits = extract_features(extractor, images, ctx.device)
    write_unit_arrays(file, features=features, logits=logits)


def draw_gaussian_images(
    mean: np.ndarray, factor: np.ndarray, start: int, stop: int, shape: Shape
) -> np.ndarray:
    """Draw images [start, stop) of the Gaussian, rounded and clamped to uint8 (n,C,H,W)."""
    index = torch.arange(start, stop)
    z = draw_normal(BASELINE_SEED, Stream.BASELINE, GAUSSIAN, index, (len(mean),)).double().numpy()
    pixels: np.ndarray = mean + z @ factor.T
    return pixels.round().clip(0, 255).astype(np.uint8).reshape(-1, *shape)


def draw_noise_images(start: int, stop: int, shape: Shape) -> np.ndarray:
    """Draw images [start, stop) of independent uniform pixels, uint8 (n,C,H,W)."""
    draw = draw_uniform(BASELINE_SEED, Stream.BASELINE, NOISE, torch.arange(start, stop), shape)
    return (draw * 256).floor().to(torch.uint8).numpy()
