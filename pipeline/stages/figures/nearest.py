"""The training images nearest to the first samples, in pixel space (Fig. 12) and in feature space (Fig. 15)."""

from pathlib import Path

import numpy as np
import torch

from pipeline.compute.units import Unit, UnitKind, Worker, make_network_unit
from pipeline.drawing.grids import save_grid
from pipeline.scores.extractors import Extractor
from pipeline.scores.image_sets import hash_shards, make_shard_set
from pipeline.stages.figures import Figure, FigureUnavailable, count_rows, locate_unit_folder
from pipeline.store import tars
from pipeline.store.arrays import read_arrays, write_arrays
from pipeline.store.run import Place

NEIGHBOURS = 9


def plan_neighbours(place: Place, extractor: Extractor | None = None) -> Figure:
    """Plan Fig. 12, the neighbours in pixel space, or with an extractor Fig. 15, those in the space of its features.

    There is a row for each of the first samples; a unit looks through one shard of training images.
    """
    name, space = "nearest_pixels", "pixel space (paper, Fig. 12)"
    if extractor:
        name, space = "nearest_features", f"the feature space of `{extractor.name}` (paper, Fig. 15)"
    n, shape = count_rows(place.experiment), place.experiment.data.shape
    shards = tars.open_shards(place.data).list_shards("train")
    own, _ = tars.load_images(place.samples, "samples", 0, n)
    galleries: list[Path | None] = [None] * len(shards)
    query = own.reshape(n, -1)
    if extractor:
        first = tars.open_shards(place.samples).list_shards("samples", n)
        drawn = make_shard_set(extractor, first, shape, place.score_units, n)
        known = make_shard_set(extractor, shards, shape, place.reference_features)
        if drawn.list_missing():
            raise FigureUnavailable("it needs the features of the samples, which `ddpm evaluate` makes")
        if known.list_missing():
            raise FigureUnavailable("it needs those of all training images, made by evaluate.reference=train")
        galleries, query = [*known.units], drawn.read_features()
    key = extractor.name if extractor else "pixels"
    folder, units = locate_unit_folder(place, "nearest", key, hash_shards(shards), n), dict[Path, Unit]()
    for shard, gallery in zip(shards, galleries, strict=True):
        file = folder / f"{shard.name.removesuffix('.tar')}.npz"
        args, title = (query, shard, gallery), f"{name} in {shard.name}"
        units |= make_network_unit(UnitKind.FIGURE, write_neighbours, args, file, title, shard.count)

    def draw(files: list[Path], file: Path) -> None:
        rows = np.concatenate([own[:, None], merge_neighbours(files)["images"]], axis=1)
        save_grid(torch.from_numpy(rows).flatten(0, 1), rows.shape[1], file)

    caption = f"Samples, first column, and the training images nearest in {space}"
    return Figure(f"{name}.png", caption, units, draw)


def write_neighbours(
    ctx: Worker, query: np.ndarray, shard: tars.Shard, gallery: Path | None, file: Path
) -> None:
    """Write the images of one shard that are the nearest to each row of `query` (n, d) (body of a unit).

    The rows are features if the file `gallery` has those of the shard, else pixels.
    """
    images, _ = tars.load_images(shard.folder, shard.split, shard.start, shard.stop)
    candidates = read_arrays(gallery)["features"] if gallery else images.reshape(len(images), -1)
    a, b = (torch.from_numpy(rows).to(ctx.device).float() for rows in (query, candidates))
    # By matrix products an image would be at some distance from itself.
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    found = distance.topk(min(NEIGHBOURS, len(images)), largest=False)
    rows = found.indices.cpu().numpy()
    write_arrays(file, distance=found.values.cpu().numpy(), index=rows + shard.start, images=images[rows])


def merge_neighbours(files: list[Path]) -> dict[str, np.ndarray]:
    """Return the nearest over all shards: distance and index in the split (n, k), images (n, k, C, H, W)."""
    parts = [read_arrays(file) for file in files]
    joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    order = joined["distance"].argsort(axis=1, kind="stable")[:, :NEIGHBOURS]
    rows = np.arange(len(order))[:, None]
    return {name: values[rows, order] for name, values in joined.items()}
