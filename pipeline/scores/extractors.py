"""The registry of feature extractors. A new one is one module, one entry here and a name in `EvaluateConfig`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddpm.precision import use_precision
from pipeline.scores import classifier, efficientnet, inception, projection
from pipeline.store.run import Place
from pipeline.store.tensors import copy_to_device

BATCH = 50  # images per forward pass: a constant, since the last bits of features depend on it


@dataclass(frozen=True)
class ExtractorKind:
    """A kind of extractor. `find_weights` returns the file of its weights for a run, and the sha256.

    The network that `load` returns maps uint8 images (N,C,H,W) to features (N, width) and, if it knows classes,
    logits (N, classes).
    """

    width: int
    find_weights: Callable[[Place], tuple[Path, str]]
    load: Callable[[Path], nn.Module]


EXTRACTORS = {
    inception.NAME: ExtractorKind(inception.WIDTH, inception.find_weights, inception.Inception),
    "classifier": ExtractorKind(classifier.FEATURES, classifier.find_weights, classifier.load_classifier),
    efficientnet.NAME: ExtractorKind(
        efficientnet.WIDTH, efficientnet.find_weights, efficientnet.load_efficientnet
    ),
    "projection": ExtractorKind(projection.FEATURES, projection.find_weights, projection.load_projection),
}


@dataclass(frozen=True)
class Extractor:
    """A feature extractor with its weights; `name` ends in the hash of the weights and is part of every protocol."""

    kind: str
    weights: Path
    sha256: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.sha256[:8]}"

    @property
    def is_published(self) -> bool:
        """True if this is the network of the published scores."""
        return self.name == f"{inception.NAME}-{inception.OFFICIAL_SHA8}"


def find_extractor(place: Place) -> Extractor:
    """Find the extractor that evaluate.features names; a classifier must be trained already."""
    kind = place.experiment.evaluate.features
    return Extractor(kind, *EXTRACTORS[kind].find_weights(place))


@torch.no_grad()
def extract_features(
    extractor: Extractor, images: np.ndarray, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Compute features (n, d) and logits (n, classes), float32, of uint8 images (n,C,H,W); without classes (n, 0).

    TF32 is off meanwhile: it would move Inception's features by more than the scores' digits.
    """
    net, outputs = load_extractor(extractor, device), []
    with use_precision("fp32"):
        for start in range(0, len(images), BATCH):
            outputs.append(net(copy_to_device(images[start : start + BATCH], device)))
    features, *logits = (torch.cat(layer).float().cpu().numpy() for layer in zip(*outputs, strict=True))
    return features, logits[0] if logits else np.empty((len(images), 0), dtype=np.float32)


@lru_cache(maxsize=1)
def load_extractor(extractor: Extractor, device: torch.device) -> nn.Module:
    """Load the network of an extractor; the last one stays in memory."""
    return EXTRACTORS[extractor.kind].load(extractor.weights).to(device)
