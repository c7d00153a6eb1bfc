"""Images that know less than any model should: what a score is worth shows beside theirs, at equal n."""

from collections.abc import Iterable
from functools import reduce
from operator import add

import numpy as np
import torch

from ddpm.rng import Stream, normal, uniform
from pipeline.scores.distances import Moments

SEED = 0  # shared by all runs on the same data
GAUSSIAN, NOISE = 0, 1  # steps of the stream


def pixel_gaussian(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and factor (d, d), with covariance = factor factor^T, of uint8 images (n,C,H,W) in parts."""
    statistics = reduce(add, (Moments.of(images.reshape(len(images), -1)) for images in parts)).statistics()
    values, vectors = np.linalg.eigh(statistics.sigma)
    return statistics.mu, vectors * np.sqrt(values.clip(min=0))


def gaussian_images(
    mean: np.ndarray, factor: np.ndarray, start: int, stop: int, shape: tuple[int, int, int]
) -> np.ndarray:
    """Draws [start, stop) of the Gaussian, rounded and clamped to uint8 (n,C,H,W)."""
    z = normal(SEED, Stream.BASELINE, GAUSSIAN, torch.arange(start, stop), (len(mean),)).double().numpy()
    pixels: np.ndarray = mean + z @ factor.T
    return pixels.round().clip(0, 255).astype(np.uint8).reshape(-1, *shape)


def noise_images(start: int, stop: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Images [start, stop) of independent uniform pixels, uint8 (n,C,H,W)."""
    draw = uniform(SEED, Stream.BASELINE, NOISE, torch.arange(start, stop), shape)
    return (draw * 256).floor().to(torch.uint8).numpy()
