"""Features, FID and the likelihood bound, beside torch-fidelity's own call and beside the bare networks.

Inception has random weights here: they change no time, and nothing is downloaded.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks import subjects
from benchmarks.harness import FLOOR, OURS, Contender, Outcome, Row, Settings, race
from benchmarks.subjects import Way
from ddpm import Diffusion, compute_bits_per_dim
from ddpm.rng import Stream, draw_normal
from pipeline.scores import distances as scores
from pipeline.scores import extractors, inception


def run(settings: Settings) -> Outcome:
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        outcome.rows += _fid(settings, Path(folder))
    outcome.rows += _bound(settings)
    return outcome


def _fid(settings: Settings, folder: Path) -> list[Row]:
    weights = _random_weights(folder / "weights.pth")
    extractor = extractors.Extractor(inception.NAME, *inception.copy_weights(str(weights), folder))
    count = 2000 if settings.on_gpu else (10 if settings.quick else 100)
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    net = extractors.load_extractor(extractor, settings.device)

    def ours() -> scores.FeatureSums:
        return scores.sum_features([extractors.extract_features(extractor, images, settings.device)], count)

    @torch.no_grad()
    def bare() -> None:
        for batch in torch.from_numpy(images).split(extractors.BATCH):
            net(batch.to(settings.device))

    def theirs() -> dict[str, float]:
        return calculate_metrics(
            input1=_Images(images), isc=True, cuda=settings.on_gpu, verbose=False, batch_size=extractors.BATCH,
            cache=False, feature_extractor_weights_path=str(weights), isc_splits=min(10, count),
        )  # fmt: skip

    found = [
        Contender(f"{OURS}: features, moments and IS", ours, count),
        Contender("torch-fidelity: features and IS", theirs, count),
        Contender(f"{FLOOR}: Inception alone", bare, count),
    ]
    return race(f"{count} images of 32x32", found, settings, "images/s", found[0].name)


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: np.ndarray):
        self.images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def _random_weights(path: Path) -> Path:
    """Inception as He initialises it, without the download that its constructor makes."""
    module = "torch_fidelity.feature_extractor_inceptionv3"
    with (
        mock.patch(f"{module}.load_state_dict_from_url", return_value={}),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        net = FeatureExtractorInceptionV3(inception.NAME, ["2048"])
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(net.state_dict(), path)
    return path


def _bound(settings: Settings) -> list[Row]:
    """The terms of a few timesteps of the NLL bound, fp32 as the evaluate stage computes them."""
    batch, steps = (250, 4) if settings.on_gpu else ((4, 1) if settings.quick else (32, 2))
    net = subjects.our_network(settings.device).eval().requires_grad_(False)
    x_0 = torch.rand(batch, 3, subjects.SIDE, subjects.SIDE, device=settings.device) * 2 - 1
    diffusion, index = Diffusion(), torch.arange(batch, device=settings.device)

    def noise(t: int, rows: Tensor) -> Tensor:
        return draw_normal(0, Stream.NLL, t, index[rows], tuple(x_0.shape[1:]))

    def ours() -> Any:
        return compute_bits_per_dim(diffusion, net, x_0, noise, timesteps=range(100, 100 + steps))

    found = [
        Contender(f"{OURS}: NLL terms", ours, batch * steps),
        Contender(f"{FLOOR}: forward alone", _repeated(settings, batch, steps), batch * steps),
    ]
    return race(f"NLL, batch {batch}", found, settings, "terms/s", found[0].name)


def _repeated(settings: Settings, batch: int, steps: int) -> Callable[[], Any]:
    forward = subjects.our_forward(settings, Way("fp32"), batch)
    return lambda: [forward() for _ in range(steps)]
