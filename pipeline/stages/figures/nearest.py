"""The training images nearest to the first samples, in pixel space (Fig. 12) and in feature space (Fig. 15)."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.compute.work import Kind, Unit, WorkerContext
from pipeline.config import Experiment
from pipeline.drawing.grids import save_grid
from pipeline.scores.image_sets import Shard, content_of, shard_set, shards_of
from pipeline.stages.figures.chains import images_asked
from pipeline.stages.figures.figure import Figure, Unavailable, unit_folder
from pipeline.stages.figures.scores_along import scored_extractor
from pipeline.store import tars
from pipeline.store.files import read_arrays, write_arrays
from pipeline.store.run import Place

if TYPE_CHECKING:
    from pipeline.scores.extractors import Extractor

NEIGHBOURS = 9


def nearest_pixels(experiment: Experiment, run: Place) -> Figure:
    caption = "Samples, first column, and the training images nearest in pixel space (paper, Fig. 12)"
    return _figure("nearest_pixels", caption, experiment, run, None)


def nearest_features(experiment: Experiment, run: Place) -> Figure:
    extractor = scored_extractor(experiment, run)
    caption = (
        f"Samples, first column, and the training images nearest in the feature space of `{extractor.name}` "
        "(paper, Fig. 15)"
    )
    return _figure("nearest_features", caption, experiment, run, extractor)


def _figure(
    name: str, caption: str, experiment: Experiment, run: Place, extractor: "Extractor | None"
) -> Figure:
    samples = run.of(experiment).samples
    n, shards = images_asked(experiment), shards_of(run.data, "train")
    galleries: list[Path | None] = [None] * len(shards)
    query = None
    if extractor:
        galleries = [*shard_set(extractor, shards, run.data / "references" / "features").units]
        query = sample_features(extractor, samples, run, n)
        if not all(gallery and gallery.exists() for gallery in galleries):
            raise Unavailable(
                "it needs the features of all training images, which evaluate.reference=train makes"
            )
    kept = [extractor.name if extractor else "pixels", content_of(shards), n]
    folder, units = unit_folder(experiment, run, "nearest", *kept), {}
    for shard, gallery in zip(shards, galleries, strict=True):
        file = folder / f"{shard.name.removesuffix('.tar')}.npz"
        args = (samples, n, query, shard, gallery, file)
        units[file] = Unit(Kind.FIGURE, search, args, f"{name} in {shard.name}", shard.count, needs_gpu=True)
    return Figure(f"{name}.png", caption, units, partial(_draw, samples, n))


def sample_features(extractor: "Extractor", samples: Path, run: Place, n: int) -> np.ndarray:
    """(n, d) float32 of the first samples. Raises Unavailable where the evaluation left none."""
    images = shard_set(extractor, shards_of(samples, "samples", n), run.score_units, n)
    if images.missing():
        raise Unavailable("it needs the features of the samples, which `ddpm evaluate` makes")
    return np.concatenate([features for features, _ in images.parts()])


def search(
    ctx: WorkerContext,
    samples: Path,
    n: int,
    query: np.ndarray | None,
    shard: Shard,
    gallery: Path | None,
    file: Path,
) -> None:
    """The work unit: of one tar, the images nearest to each of n samples, by pixels unless features are given."""
    images, _ = tars.iterate_shard_images(shard.folder, shard.split, shard.name)
    if gallery is None or query is None:
        query = tars.load_images(samples, "samples", 0, n)[0].reshape(n, -1)
        candidates = images.reshape(len(images), -1)
    else:
        candidates = read_arrays(gallery)["features"]
    a, b = (torch.from_numpy(rows).to(ctx.device).float() for rows in (query, candidates))
    # By matrix products an image would be at some distance from itself.
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    found = distance.topk(min(NEIGHBOURS, len(images)), largest=False)
    place = found.indices.cpu().numpy()
    write_arrays(file, distance=found.values.cpu().numpy(), index=place + shard.start, images=images[place])


def nearest(files: list[Path]) -> dict[str, np.ndarray]:
    """Over all tars, nearest first: distance and index in the split (n, k), images (n, k, C, H, W)."""
    parts = [read_arrays(file) for file in files]
    joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    order = joined["distance"].argsort(axis=1, kind="stable")[:, :NEIGHBOURS]
    rows = np.arange(len(order))[:, None]
    return {name: values[rows, order] for name, values in joined.items()}


def _draw(samples: Path, n: int, files: list[Path], file: Path) -> None:
    shown, _ = tars.load_images(samples, "samples", 0, n)
    rows = np.concatenate([shown[:, None], nearest(files)["images"]], axis=1)
    save_grid(torch.from_numpy(rows).flatten(0, 1), rows.shape[1], file)
