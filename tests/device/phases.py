"""Prints as JSON what each phase asks of a GPU: python tests/device/phases.py NETWORK PRECISION [PHASE ...].

NETWORK is one of MODELS. The phases run the functions of ddpm/ and pipeline/ as the stages call them, on fake tensors.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import fakecuda  # before torch
import numpy as np
import torch

from ddpm import config, rng
from ddpm.diffusion import Diffusion
from ddpm.kernels import accelerate
from ddpm.kernels.cuda import keep_cast_weights
from ddpm.likelihood import compute_bits_per_dim
from ddpm.networks import NETWORKS
from ddpm.networks.build import build_network
from ddpm.precision import PreciseNetwork
from ddpm.sampler import run_image_chains
from ddpm.training import TrainState, train_step
from pipeline.config import load_experiment
from pipeline.data.dataset import MemoryDataset
from pipeline.scores import extractors
from pipeline.scores.classifier import Classifier
from pipeline.stages import train

CUDA = torch.device("cuda", 0)
IMAGES = 1000  # of the data
OPTIONS = {"recomputing unet": ["model.recompute=4"], "fused unet": ["model.fused=true"]}
CALL = 250  # images of a network call in sampling and NLL


class Phases:
    """The phases of one network in one precision, each a function that is called and counted on its own."""

    def __init__(self, name: str, precision: str) -> None:
        self.name, self.precision = name, precision
        experiment = load_experiment(name if name == "celebahq256" else "cifar10", OPTIONS.get(name, []))
        self.model = NETWORKS[name]() if name in NETWORKS and name != "unet" else experiment.model
        self.shape, labels = experiment.data.shape, 10 if self.model.takes_labels else 0
        # celebahq256: two of the eight parts of its batch of 64; each of the others holds and asks the same
        part = {"batch_size": 16, "accumulate": 2} if name == "celebahq256" else {"accumulate": 1}
        self.config = replace(experiment.train, precision=precision, **part)
        self.diffusion = Diffusion(experiment.diffusion)
        self.net = build_network(self.model, self.shape[1], self.shape[0], self.shape[0], 0, labels, "meta")
        self.net = fakecuda.move_to_device(accelerate(self.net))
        self.has_labels = labels > 0

    def count(self, phase) -> dict:
        """Run a phase and return what it asked of the device."""
        with fakecuda.Count([]):
            call, held = phase()
        with fakecuda.Count([*held, *self.net.parameters(), *self.net.buffers()]) as count:
            call()
        return count.summarise()

    def _prepare_training(self):
        state = TrainState(self.config, self.net, config.DiffusionConfig())
        data = MemoryDataset.__new__(MemoryDataset)  # its constructor wants arrays
        data.images = torch.empty(IMAGES, *self.shape, dtype=torch.uint8, device=CUDA)
        data.labels = torch.zeros(IMAGES, dtype=torch.int64, device=CUDA)
        averages = [p for ema in state.emas for p in ema.parameters.values()]
        moments = [x for of_one in state.optimizer.state.values() for x in of_one.values()]
        rows = torch.arange(self.config.batch_size)
        train.list_image_indices(0, IMAGES, 0, len(rows), rows, CUDA)  # draws the order of the epoch
        return state, self.diffusion.to(CUDA), data, rows, [data.images, *averages, *moments]

    def step(self):
        """A training step, with the fetching of its images."""
        state, diffusion, data, rows, held = self._prepare_training()

        def call() -> None:
            x_0, labels = data.read_batch(train.list_image_indices(0, IMAGES, 0, len(rows), rows, CUDA))
            context = labels if self.has_labels else None
            train_step(state, diffusion, x_0, rows, config=self.config, seed=0, context=context)

        call()  # the first one learns the sizes of the layers
        return call, held

    def warm_up(self):
        """The pass that comes before the first step where there are peers."""
        state, diffusion, data, rows, held = self._prepare_training()
        state.net.zero_grad(set_to_none=True)
        x_0, labels = data.images[: len(rows)], data.labels[: len(rows)] if self.has_labels else None
        inputs = state, diffusion, x_0, labels, rows, self.config, self.net
        return partial(train._fix_gradient_buckets, *inputs), held

    def _prepare_sampling(self):
        net = self.net.eval().requires_grad_(False)
        if self.precision == "bf16":
            keep_cast_weights(net)
        return PreciseNetwork(net, self.precision)

    def reverse(self):
        """The second reverse step: the first one moves the tables to the device."""
        index = torch.arange(CALL, device=CUDA)
        net = self._prepare_sampling()
        steps = run_image_chains(self.diffusion, net, index=index, shape=self.shape, seed=0)
        next(steps)
        return partial(next, steps), []

    def nll(self):
        """The NLL of some images, at two timesteps."""
        x_0, index = torch.empty(CALL, *self.shape, device=CUDA), torch.arange(CALL, device=CUDA)

        def noise(t: int, rows: torch.Tensor) -> torch.Tensor:
            return rng.draw_normal(0, rng.Stream.NLL, t, index[rows], self.shape)

        inputs = self.diffusion, self._prepare_sampling(), x_0, noise
        return partial(compute_bits_per_dim, *inputs, timesteps=range(2), batch_size=CALL), []

    def features(self):
        """The features of three batches of images, by the classifier."""
        extractors.load_extractor = lambda *_: self.classifier
        with torch.device("meta"):
            self.classifier = Classifier(self.shape[0], 10)
        self.classifier = fakecuda.move_to_device(self.classifier)
        images = np.zeros((3 * extractors.BATCH, *self.shape), dtype=np.uint8)
        extractor = extractors.Extractor("classifier", Path(), "")
        return partial(extractors.extract_features, extractor, images, CUDA), []


def main() -> None:
    name, precision, *phases = sys.argv[1:]
    with fakecuda.FakeCUDA():
        subject = Phases(name, precision)
        print(json.dumps({phase: subject.count(getattr(subject, phase)) for phase in phases}, indent=1))


if __name__ == "__main__":
    main()
