"""Our extractors as torch-fidelity takes them, so that its own call scores with them."""

from pathlib import Path

import torch
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from pipeline.scores import inception
from pipeline.scores.extractors import EXTRACTORS, Extractor


class Images(torch.utils.data.TensorDataset):
    """Images as torch-fidelity takes them: one uint8 CHW tensor each, where torch gives a tuple of one."""

    def __getitem__(self, i):
        return self.tensors[0][i]


class Registered(FeatureExtractorBase):
    def __init__(self, name, features_list, feature_extractor_weights_path="", **_):
        super().__init__(name, features_list)
        self.net = EXTRACTORS[name.rpartition("-")[0]].load(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        outputs = dict(zip(self.get_provided_features_list(), self.net(images), strict=False))
        return tuple(outputs[layer] for layer in self.features_list)


def arguments(extractor: Extractor, *metrics: str) -> dict:
    """Return the arguments of calculate_metrics for an extractor and these metrics."""
    own = extractor.kind == inception.NAME
    if not own and extractor.name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(extractor.name, Registered)
    features, logits = inception.LAYERS if own else Registered.get_provided_features_list()
    return {
        "feature_extractor": inception.NAME if own else extractor.name,
        "feature_extractor_weights_path": str(extractor.weights),
        **{f"feature_layer_{metric}": logits if metric == "isc" else features for metric in metrics},
    }
