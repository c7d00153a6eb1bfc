"""Sets of images as files of features: what a work unit makes of a tar, and where it keeps it.

Features are kept under the hash of the tar and of the extractor, so they are used wherever they hold and
nowhere else. This module is cheap to import: torch-fidelity is loaded when features are made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import tars
from pipeline.config import hash_of
from pipeline.errors import PipelineError
from pipeline.rundir import Run, read_arrays, write_arrays
from pipeline.worker import Unit, WorkerContext

if TYPE_CHECKING:
    from pipeline.fidelity.extractors import Extractor
    from pipeline.fidelity.scores import Scored, Statistics

BASELINE_UNIT = 500  # images
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Shard:
    """A tar of images [start, start + count) of a split."""

    folder: Path
    split: str
    name: str
    start: int
    count: int
    sha256: str


def shards_of(folder: Path, split: str, n: int | None = None) -> list[Shard]:
    """The tars that hold the first n images of a split (None: all). Raises PipelineError where it has fewer."""
    index = tars.open_index(folder)
    n = index.count(split) if n is None else n
    if index.count(split) < n:
        raise PipelineError(
            f"{folder} holds {index.count(split)} images where {n} are to be scored; a short set has no score: "
            "run the stage before this one"
        )
    return [
        Shard(folder, split, name, start, count, index.facts["files"][name]["sha256"])
        for name, start, count in index.shards(split)
        if start < n
    ]


def content_of(shards: list[Shard]) -> str:
    """A hash of the images in these tars."""
    return hash_of([shard.sha256 for shard in shards])


@dataclass(frozen=True)
class ImageSet:
    """n images as files of features in order, each with the unit that makes it; the last may hold more."""

    n: int
    units: dict[Path, Unit]

    def missing(self) -> list[Unit]:
        return [unit for file, unit in self.units.items() if not file.exists()]

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features and logits, file by file, up to the n-th image."""
        left = self.n
        for file in self.units:
            arrays = read_arrays(file)
            features, logits = arrays["features"][:left], arrays["logits"][:left]
            left -= len(features)
            yield features, logits

    def score(self) -> "Scored":
        from pipeline.fidelity.scores import score

        return score(self.parts(), self.n)


def shard_set(extractor: "Extractor", shards: list[Shard], folder: Path, n: int | None = None) -> ImageSet:
    """The first n images (None: all) of these tars; features are kept in `folder`."""
    units = {}
    for shard in shards:
        file = folder / extractor.name / f"{shard.sha256[:16]}.npz"
        unit = Unit(extract_shard, (extractor, shard, file), f"features of {shard.name}", shard.count)
        units[file] = unit
    return ImageSet(sum(shard.count for shard in shards) if n is None else n, units)


def baseline_set(extractor: "Extractor", n: int, shape: Shape, folder: Path, pixels: Path | None) -> ImageSet:
    """n images of the Gaussian in the file `pixels`, or of uniform noise where that is None."""
    units, kind = {}, pixels.stem if pixels else "noise"
    for start in range(0, n, BASELINE_UNIT):
        stop = min(start + BASELINE_UNIT, n)
        file = folder / extractor.name / f"{kind}-{start}-{stop}.npz"
        args = (extractor, pixels, start, stop, shape, file)
        units[file] = Unit(extract_baseline, args, f"features of {kind} {start}-{stop - 1}", stop - start)
    return ImageSet(n, units)


# Work units


def extract_shard(ctx: WorkerContext, extractor: "Extractor", shard: Shard, file: Path) -> None:
    """Features of one tar."""
    images, _ = tars.iterate_shard_images(shard.folder, shard.split, shard.name)
    _extract(ctx, extractor, images, file)


def extract_baseline(
    ctx: WorkerContext, extractor: "Extractor", pixels: Path | None, start: int, stop: int, shape: Shape, file: Path
) -> None:  # fmt: skip
    """Features of images [start, stop) of a baseline."""
    from pipeline.fidelity.baselines import gaussian_images, noise_images

    if pixels is None:
        images = noise_images(start, stop, shape)
    else:
        arrays = read_arrays(pixels)
        images = gaussian_images(arrays["mean"], arrays["factor"], start, stop, shape)
    _extract(ctx, extractor, images, file)


def _extract(ctx: WorkerContext, extractor: "Extractor", images: np.ndarray, file: Path) -> None:
    from pipeline.fidelity.extractors import extract

    features, logits = extract(extractor, images, ctx.device)
    write_arrays(file, features=features, logits=logits)


# The reference


@dataclass(frozen=True)
class Reference:
    """The statistics of a split of the data, kept with the hash of its images: never stale, never mixed."""

    file: Path
    content: str

    @staticmethod
    def of(run: Run, extractor: "Extractor", split: str) -> "Reference":
        file = run.data / "references" / f"{extractor.name}-{split}.npz"
        return Reference(file, content_of(shards_of(run.data, split)))

    def load(self) -> "Statistics | None":
        """What is on disk, if it is of these images."""
        from pipeline.fidelity.scores import Statistics

        if not self.file.exists():
            return None
        arrays = read_arrays(self.file)
        if arrays["content"].item() != self.content:
            return None
        return Statistics(int(arrays["n"]), arrays["mu"], arrays["sigma"])

    def make(self, images: ImageSet) -> "Statistics":
        """Sum up the features of the whole split, and keep the result."""
        found = images.score().moments.statistics()
        kept = {"n": np.array(found.n), "content": np.array(self.content)}
        write_arrays(self.file, mu=found.mu, sigma=found.sigma, **kept)
        return found
