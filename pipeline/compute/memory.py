"""The memory of a training step, from a step on fake tensors: they have shapes, types and sizes, and no values."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import PyTree, tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ddpm.diffusion import Diffusion
from ddpm.kernels.cuda import ByteDropout
from ddpm.networks.build import build_network
from ddpm.networks.layers import RowDropout
from ddpm.training import TrainState, train_step
from pipeline.compute.units import GIB
from pipeline.config import Experiment
from pipeline.errors import PipelineError

BLOCK = 512  # bytes, of torch's allocator on a GPU
CARDS = (80, 40, 24)  # GiB
USABLE = 0.9  # of a card: the rest is for convolutions, CUDA itself and fragmentation


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all tensors of a device that are alive; `peak` is the most at once.

    Left out are the workspaces of convolutions, CUDA's context, and what fragmentation takes.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.alive, self.peak = device, 0, 0
        self.storages = WeakIdKeyDictionary()

    def count_tensors(self, tensors: list[torch.Tensor]) -> None:
        """Count tensors, each storage once, until they are dropped."""
        for x in tensors:
            storage = x.untyped_storage()
            if x.device.type == self.device and storage not in self.storages:
                taken = -(-storage.nbytes() // BLOCK) * BLOCK
                self.storages[storage] = taken
                weakref.finalize(storage, self._drop, taken)
                self.alive += taken
        self.peak = max(self.peak, self.alive)

    def _drop(self, taken: int) -> None:
        self.alive -= taken

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: PyTree = (),
        kwargs: dict[str, PyTree] | None = None,
    ) -> PyTree:
        if func._schema.name == "aten::_local_scalar_dense":  # int(x): a fake tensor has no value
            return 0
        result = func(*args, **(kwargs or {}))
        self.count_tensors([x for x in tree_leaves(result) if isinstance(x, torch.Tensor)])
        return result


def estimate_step_memory(experiment: Experiment, images: int, accumulate: int) -> int:
    """Estimate the peak bytes of a GPU in a worker's training step with a slice of `images` images.

    Except for dropout, the layers are the plain ones; those of `ddpm.kernels`, which a GPU uses, hold less.
    """
    config = replace(experiment.train, batch_size=images, accumulate=accumulate)
    data, diffusion = experiment.data, Diffusion(experiment.diffusion)
    shape, outputs = (data.image_size, data.channels), diffusion.count_output_channels(data.channels)
    labels = experiment.num_classes
    net = build_network(experiment.model, *shape, outputs, 0, labels, "meta", len(diffusion))
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryCounter("cpu") as memory:
        _make_fake(net)
        state = TrainState(config, net, experiment.diffusion)
        x_0, index = torch.empty(images, *data.shape, dtype=torch.uint8), torch.arange(images)
        context = torch.zeros(images, dtype=torch.int64) if labels else None
        train_step(state, diffusion, x_0, index, config=config, seed=0, context=context)
    peak: int = memory.peak
    return peak


def describe_step_memory(experiment: Experiment, workers: int) -> str:
    """Describe the GPU memory of a step of one of these workers, and the least train.accumulate for some cards."""
    config = experiment.train
    images = max(1, config.batch_size // workers)
    needs = _estimate_needs(experiment, images)
    fits = {card: _find_least_parts(needs, card) or "too small" for card in CARDS}
    cards = ", ".join(f"{card} GiB: {parts}" for card, parts in fits.items())
    parts = min(config.accumulate or 1, images)
    return (
        f"{needs[parts]:.1f} GiB of a GPU, for {images} images with train.accumulate={parts} in {config.precision} "
        f"and the images themselves; least train.accumulate for a card of {cards}"
    )


def choose_accumulate(experiment: Experiment, images: int, card: float) -> int:
    """Choose the least train.accumulate for a worker's slice of so many images on a GPU of `card` GiB.

    Raises PipelineError where a part of one image is too large.
    """
    needs = _estimate_needs(experiment, images)
    if (parts := _find_least_parts(needs, card)) is None:
        raise PipelineError(
            f"a training step needs {needs[images]:.1f} GiB of a GPU even image by image, this one has {card:.1f} GiB: "
            "use train.precision=bf16, a smaller network or a larger GPU"
        )
    return parts


def _estimate_needs(experiment: Experiment, images: int) -> dict[int, float]:
    """Estimate the GiB of a step at each train.accumulate, which decides how many images are in memory at once."""
    whole, half = (estimate_step_memory(experiment, images, parts) / GIB for parts in (1, 2))
    return {parts: whole - 2 * (whole - half) * (1 - 1 / parts) for parts in range(1, images + 1)}


def _find_least_parts(needs: dict[int, float], card: float) -> int | None:
    return min((parts for parts in needs if needs[parts] < USABLE * card), default=None)


def _make_fake(net: nn.Module) -> None:
    """Replace the tensors of a network on the meta device by fake ones; Module.to cannot."""
    for module in net.modules():
        module.__class__ = ByteDropout if type(module) is RowDropout else type(module)
        for name, p in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(torch.empty_like(p, device="cpu"))
        for name, b in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(b, device="cpu")
