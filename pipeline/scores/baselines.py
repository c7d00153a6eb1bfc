"""Baselines: images of a Gaussian and of noise, whose scores are worse than any model's should be."""

from collections.abc import Iterable
from functools import reduce
from operator import add

import numpy as np
import torch

from ddpm.rng import Stream, draw_normal, draw_uniform
from pipeline.scores.distances import Moments

SEED = 0  # shared by all runs on the same data
GAUSSIAN, NOISE = 0, 1  # steps of the stream


def fit_gaussian(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Fit a Gaussian to uint8 images (n,C,H,W) in parts: mean (d,) and factor (d, d), covariance = factor factor^T."""
    statistics = reduce(
        add, (Moments.from_features(images.reshape(len(images), -1)) for images in parts)
    ).to_statistics()
    return statistics.mu, statistics.factor_covariance()


def fit_principal_directions(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return mean (d,), factor (d, r) and the variance of each other direction, of images too large for a covariance.

    The first half of the uint8 images (n,C,H,W), n >= 2, gives the directions, by its Gram matrix, and the second half
    the variances: along directions that were computed from a set, it varies more than other images do.
    """
    pixels = images.reshape(len(images), -1).astype(np.float64)
    mean = pixels.mean(axis=0)
    first, second = np.array_split(pixels - mean, 2)
    directions = np.linalg.svd(first, full_matrices=False)[2].T
    variances = ((second @ directions) ** 2).mean(axis=0)
    rest = ((second**2).sum(axis=1).mean() - variances.sum()) / max(1, len(mean) - len(variances))
    return mean, directions * np.sqrt(variances), float(rest.clip(min=0))


def draw_gaussian_images(
    mean: np.ndarray, factor: np.ndarray, start: int, stop: int, shape: tuple[int, int, int]
) -> np.ndarray:
    """Draw images [start, stop) of the Gaussian, rounded and clamped to uint8 (n,C,H,W)."""
    z = draw_normal(SEED, Stream.BASELINE, GAUSSIAN, torch.arange(start, stop), (len(mean),)).double().numpy()
    pixels: np.ndarray = mean + z @ factor.T
    return pixels.round().clip(0, 255).astype(np.uint8).reshape(-1, *shape)


def draw_noise_images(start: int, stop: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Draw images [start, stop) of independent uniform pixels, uint8 (n,C,H,W)."""
    draw = draw_uniform(SEED, Stream.BASELINE, NOISE, torch.arange(start, stop), shape)
    return (draw * 256).floor().to(torch.uint8).numpy()
