"""A small convolutional classifier: labels turn into features that know what the images show.

It stands in for Inception where images are small or weights are out of reach. Its scores compare runs on the
same data and nothing else, so it is trained once per data key, and every protocol names it by its hash.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm.images import from_uint8
from ddpm.rng import Stream, integers, normal
from pipeline.store.files import hash_file
from pipeline.store.run import Place

FEATURES = 64
# Bounded: seconds for digits, a minute for CIFAR-10 on one core.
STEPS, BATCH_SIZE, LR = 800, 64, 2e-3
SEED = 0
LARGEST_SIDE = 32  # larger images are averaged down, which bounds the cost


class Classifier(nn.Module):
    """uint8 images (N,C,H,W) -> features (N, 64) and logits (N, classes), float32."""

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
        x = F.adaptive_avg_pool2d(x, 2)  # (N, 64, 2, 2): where something is matters for digits
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.head(features)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw He's initialisation by counter: equal on every machine."""
        for number, parameter in enumerate(self.parameters()):
            if parameter.ndim == 1:
                parameter.zero_()
                continue
            draw = normal(SEED, Stream.CLASSIFIER, 0, torch.tensor([number]), tuple(parameter.shape))[0]
            parameter.copy_(draw * (2 / parameter[0].numel()) ** 0.5)


def train(images: np.ndarray, labels: np.ndarray, classes: int) -> Classifier:
    """Fit to uint8 images (n,C,H,W) and their labels in 0..classes-1, in fp32 on one thread, so that the same
    machine gives the same bits however many threads are around."""
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    net = Classifier(x.shape[1], classes)
    net.reset_parameters()
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS)
    rows, threads = torch.arange(BATCH_SIZE), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(STEPS):
            chosen = integers(SEED, Stream.CLASSIFIER, step + 1, rows, len(x))
            _, logits = net(x[chosen])
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits, y[chosen]).backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(net: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images whose largest logit is their label."""
    batches = torch.from_numpy(images).split(500)
    predicted = torch.cat([net(batch)[1].argmax(dim=1) for batch in batches])
    return float((predicted.numpy() == labels).mean())


def save(net: Classifier, path: Path) -> None:
    save_file(net.state_dict(), path)


def load(path: Path) -> Classifier:
    """Load the network of a file; its shape is read from the tensors."""
    state = load_file(path)
    net = Classifier(state["convs.0.weight"].shape[1], len(state["head.bias"]))
    net.load_state_dict(state)
    return net.eval()


def find_weights(place: Place) -> tuple[Path, str]:
    """Find the classifier of the run's data, which is trained by then."""
    return place.classifier, hash_file(place.classifier)
