"""A small convolutional classifier, as a feature extractor for images with labels.

It replaces Inception if images are small or Inception's weights cannot be fetched. Its scores compare runs on
the same data only, so it is trained once per data key, and every protocol names it by its hash.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ddpm.images import from_uint8
from ddpm.rng import Stream, draw_integers, draw_normal
from pipeline.store.files import hash_file
from pipeline.store.run import Place

FEATURES = 64
STEPS, BATCH_SIZE, LR = 800, 64, 2e-3  # seconds for digits, a minute for CIFAR-10 on one core
SEED = 0
LARGEST_SIDE = 32  # larger images are averaged down, which bounds the cost


class Classifier(nn.Module):
    """The network from uint8 images (N,C,H,W) to features (N, 64) and logits (N, classes), float32."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride, padding=1)
            for before, after, stride in ((channels, 32, 1), (32, 64, 2), (64, 64, 2))
        )
        self.hidden = nn.Linear(64 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = from_uint8(images)
        if max(x.shape[2:]) > LARGEST_SIDE:
            x = F.adaptive_avg_pool2d(x, LARGEST_SIDE)
        for conv in self.convs:
            x = F.relu(conv(x))
        x = F.adaptive_avg_pool2d(x, 2)  # (N, 64, 2, 2): for digits it matters where something is
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.head(features)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights (He et al. 2015), equal on every machine."""
        for number, parameter in enumerate(self.parameters()):
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                index, shape = torch.tensor([number]), tuple(parameter.shape)
                draw = draw_normal(SEED, Stream.CLASSIFIER, 0, index, shape)[0]
                parameter.copy_(draw * (2 / parameter[0].numel()) ** 0.5)


def fit_classifier(images: np.ndarray, labels: np.ndarray, classes: int) -> Classifier:
    """Train a classifier on uint8 images (n,C,H,W) and their labels in 0..classes-1.

    It trains in fp32 on one thread, so that the same machine gives the same bits for any number of threads.
    """
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    net = Classifier(x.shape[1], classes)
    net.reset_parameters()
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS)
    rows, threads = torch.arange(BATCH_SIZE), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(STEPS):
            batch = draw_integers(SEED, Stream.CLASSIFIER, step + 1, rows, len(x))
            _, logits = net(x[batch])
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits, y[batch]).backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def measure_accuracy(net: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Measure the share of images whose largest logit is their label, to four digits."""
    batches = torch.from_numpy(images).split(500)
    predicted = torch.cat([net(batch)[1].argmax(dim=1) for batch in batches])
    return round(float((predicted.numpy() == labels).mean()), 4)


def load_classifier(path: Path) -> Classifier:
    """Load the network from a file; its size follows from the shapes of the tensors."""
    state = load_file(path)
    net = Classifier(state["convs.0.weight"].shape[1], len(state["head.bias"]))
    net.load_state_dict(state)
    return net.eval()


def find_weights(place: Place) -> tuple[Path, str]:
    """Return the file of the data's classifier, which must be trained already, and its sha256."""
    return place.classifier, hash_file(place.classifier)
