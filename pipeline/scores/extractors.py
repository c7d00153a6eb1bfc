"""Images -> features: the registry of feature extractors. A new one is one module and one entry here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.scores import classifier, inception, projection
from pipeline.store.run import Place

BATCH = 50  # images per forward pass: a constant, since the last bits of features depend on it


@dataclass(frozen=True)
class Family:
    """A kind of extractor: the width of its features, what finds its weights for a run and their sha256, and the
    network in a file of them. The network maps uint8 images (N,C,H,W) to features (N, width) and, where it knows
    classes, logits (N, classes)."""

    width: int
    find_weights: Callable[[Place], tuple[Path, str]]
    load: Callable[[Path], nn.Module]


EXTRACTORS = {
    inception.NAME: Family(inception.WIDTH, inception.find_weights, inception.load),
    "classifier": Family(classifier.FEATURES, classifier.find_weights, classifier.load),
    "projection": Family(projection.FEATURES, projection.find_weights, projection.load),
}


@dataclass(frozen=True)
class Extractor:
    """An entry of EXTRACTORS with its weights. `name` ends in their hash and stands in every protocol."""

    kind: str
    name: str
    weights: Path

    @staticmethod
    def of(kind: str, weights: Path, sha256: str) -> "Extractor":
        return Extractor(kind, f"{kind}-{sha256[:8]}", weights)

    @property
    def is_official(self) -> bool:
        """Whether this is the network of the published scores."""
        return self.name == f"{inception.NAME}-{inception.OFFICIAL_SHA8}"


def find_extractor(place: Place) -> Extractor:
    """Find the extractor that evaluate.features names; the classifier is trained by then."""
    kind = place.experiment.evaluate.features
    return Extractor.of(kind, *EXTRACTORS[kind].find_weights(place))


def extract(extractor: Extractor, images: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Compute features (n, d) and logits (n, classes), float32, of uint8 images (n,C,H,W); without classes (n, 0)."""
    net = load_network(extractor, device)
    features, logits = [], []
    with torch.no_grad(), _full_precision():
        for batch in torch.from_numpy(images).split(BATCH):
            outputs: list[Tensor] = [layer.float().cpu() for layer in net(batch.to(device))]
            features.append(outputs[0])
            logits.append(outputs[1] if len(outputs) > 1 else torch.empty(len(batch), 0))
    return torch.cat(features).numpy(), torch.cat(logits).numpy()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 off: it would move Inception's features by more than the scores' digits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@lru_cache(maxsize=1)
def load_network(extractor: Extractor, device: torch.device) -> nn.Module:
    """Load the network of an extractor; the last one is kept."""
    return EXTRACTORS[extractor.kind].load(extractor.weights).to(device)
