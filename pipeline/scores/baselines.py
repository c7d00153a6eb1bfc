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
    values, vectors = np.linalg.eigh(statistics.sigma)
    return statistics.mu, vectors * np.sqrt(values.clip(min=0))


def draw_gaussian(
    mean: np.ndarray, factor: np.ndarray, start: int, stop: int, shape: tuple[int, int, int]
) -> np.ndarray:
    """Draw images [start, stop) of the Gaussian, rounded and clamped to uint8 (n,C,H,W)."""
    z = draw_normal(SEED, Stream.BASELINE, GAUSSIAN, torch.arange(start, stop), (len(mean),)).double().numpy()
    pixels: np.ndarray = mean + z @ factor.T
    return pixels.round().clip(0, 255).astype(np.uint8).reshape(-1, *shape)


def draw_noise(start: int, stop: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Draw images [start, stop) of independent uniform pixels, uint8 (n,C,H,W)."""
    draw = draw_uniform(SEED, Stream.BASELINE, NOISE, torch.arange(start, stop), shape)
    return (draw * 256).floor().to(torch.uint8).numpy()
