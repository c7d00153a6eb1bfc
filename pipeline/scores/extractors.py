"""Images -> features, through torch-fidelity's extractors and two of our own that are registered with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from pipeline.errors import PipelineError
from pipeline.scores import classifier, projection
from pipeline.store.files import atomic_file, sha256_of
from pipeline.store.tensors import load_tensors

INCEPTION = "inception-v3-compat"
OFFICIAL_SHA8 = "6726825d"  # of the file at URL_INCEPTION_V3, as its name says
BATCH = 50  # images per forward pass: a constant, since the last bits of features depend on it


@dataclass(frozen=True)
class Extractor:
    """A feature extractor and its weights.

    `name` ends in their hash and stands in every protocol; `registered` is its name with torch-fidelity;
    `logits` is the layer that IS reads, None where there are no classes.
    """

    name: str
    registered: str
    weights: Path
    features: str
    logits: str | None

    @property
    def is_official(self) -> bool:
        """Whether this is the network of the published scores."""
        return self.name == f"{INCEPTION}-{OFFICIAL_SHA8}"


def extract(extractor: Extractor, images: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) and logits (n, classes), float32, of uint8 images (n,C,H,W); without classes (n, 0)."""
    net = _load(extractor, device)
    if extractor.registered == INCEPTION and images.shape[1] == 1:
        images = images.repeat(3, axis=1)
    features, logits = [], []
    with torch.no_grad(), _full_precision():
        for batch in torch.from_numpy(images).split(BATCH):
            outputs = [layer.float().cpu() for layer in net(batch.to(device))]
            features.append(outputs[0])
            logits.append(outputs[1] if extractor.logits else torch.empty(len(batch), 0))
    return torch.cat(features).numpy(), torch.cat(logits).numpy()


@contextmanager
def _full_precision() -> Iterator[None]:
    """TF32 would move Inception's features by more than the scores' digits."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@lru_cache(maxsize=1)
def _load(extractor: Extractor, device: torch.device) -> nn.Module:
    register(extractor)
    layers = [extractor.features] + ([extractor.logits] if extractor.logits else [])
    return _create(extractor.registered, layers, extractor.weights).to(device)


def _create(name: str, layers: list[str], weights: Path) -> nn.Module:
    return create_feature_extractor(
        name, layers, cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
    )


def register(extractor: Extractor) -> None:
    """Make the extractor known to torch-fidelity in this process, under `extractor.registered`."""
    if extractor.registered not in FEATURE_EXTRACTORS_REGISTRY:
        kind = ClassifierExtractor if extractor.logits else ProjectionExtractor
        register_feature_extractor(extractor.registered, kind)


class _FromFile(FeatureExtractorBase):
    """What torch-fidelity asks of an extractor, for a network that lies in a weights file."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str = "", **_: Any
    ):
        super().__init__(name, features_list)
        self.net = self.load(Path(feature_extractor_weights_path))

    @staticmethod
    def load(path: Path) -> nn.Module:
        raise NotImplementedError

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class ClassifierExtractor(_FromFile):
    load = staticmethod(classifier.load)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = dict(zip(self.get_provided_features_list(), self.net(images), strict=True))
        return tuple(outputs[layer] for layer in self.features_list)


class ProjectionExtractor(_FromFile):
    load = staticmethod(projection.load)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "features"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.net(images),)


# Where each extractor's weights come from


def classifier_extractor(path: Path) -> Extractor:
    """The classifier in the file."""
    name = f"classifier-{sha256_of(path)[:8]}"
    return Extractor(name, name, path, "features", "logits")


def projection_extractor(path: Path, channels: int) -> Extractor:
    """The projection for images of so many channels; `path` is written unless it is there."""
    if not path.exists():
        with atomic_file(path) as temporary:
            projection.save(projection.Projection(channels), temporary)
    name = f"projection-{sha256_of(path)[:8]}"
    return Extractor(name, name, path, "features", None)


def inception_extractor(weights: str | None, cache: Path) -> Extractor:
    """torch-fidelity's Inception with the weights of a local file, or of torch-fidelity's download.

    It unpickles whatever it is given, so it is given a copy in `cache` that was read as tensors only and fits
    the network. Raises PipelineError naming a file that is not Inception's.
    """
    source = Path(weights) if weights else _downloaded()
    name = f"{INCEPTION}-{sha256_of(source)[:8]}"
    copy = cache / f"{name}.pth"
    if not copy.exists():
        tensors = load_tensors(source, _remedy())
        with atomic_file(copy) as temporary:
            torch.save(tensors, temporary)
            _require_inception(source, temporary)
    return Extractor(name, INCEPTION, copy, "2048", "logits_unbiased")


def _require_inception(source: Path, copy: Path) -> None:
    try:
        _create(INCEPTION, ["2048"], copy)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        what = "; ".join(line if len(line) < 150 else line[:150] + " ..." for line in lines[:2])
        raise PipelineError(
            f"{source} (sha256 {sha256_of(source)[:8]}) is not Inception: {what}; {_remedy()}"
        ) from error


def download_path() -> Path:
    """Where torch-fidelity keeps Inception's weights once they were fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


def _downloaded() -> Path:
    """The file where torch-fidelity itself looks for it, fetched if need be."""
    path = download_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), OFFICIAL_SHA8, progress=False)
        except (OSError, RuntimeError) as error:
            raise PipelineError(
                f"Inception's weights cannot be fetched ({error}); {_remedy()}, or put it at {path}"
            ) from error
    if not sha256_of(path).startswith(OFFICIAL_SHA8):
        raise PipelineError(f"{path} is damaged: its sha256 does not begin with {OFFICIAL_SHA8}; delete it")
    return path


def _remedy() -> str:
    return f"get {URL_INCEPTION_V3} and name it in evaluate.extractor_weights"
