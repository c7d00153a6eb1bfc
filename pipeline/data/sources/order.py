"""A fixed shuffle: the same on every machine and with every version of NumPy."""

from pathlib import Path

import numpy as np

from pipeline.errors import PipelineError


def shuffled(n: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 (n,), that depends on n alone.

    It sorts the raw 64-bit words of the counter-based generator Philox under the key 0: NumPy promises that
    stream for ever, and promises nothing of `Generator.permutation`.
    """
    return np.argsort(np.random.Philox(key=0).random_raw(n), kind="stable")


def held_out(place: Path, n: int, test_images: int) -> dict[str, np.ndarray]:
    """The indices of the splits of a set at `place` that has no split of its own, in shuffled order."""
    if test_images >= n:
        raise PipelineError(f"{place} has {n} images; data.test_images={test_images} leaves none to train on")
    order = shuffled(n)
    if not test_images:
        return {"train": order}
    return {"train": order[test_images:], "test": order[:test_images]}


def neighbouring(place: Path, counts: dict[str, int], test_images: int) -> dict[str, tuple[str, np.ndarray]]:
    """split -> (the part of the set that holds it, its ascending indices there), for sets of `counts` images
    in which neighbours are read together cheaply. Without a test part, `test_images` are held out."""
    if "test" in counts:
        return {split: (split, np.arange(count)) for split, count in counts.items()}
    splits = held_out(place, counts["train"], test_images)
    return {split: ("train", np.sort(indices)) for split, indices in splits.items()}
