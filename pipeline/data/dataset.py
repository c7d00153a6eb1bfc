"""Batches of training: any images of a split, in any order.

A small split is held in memory as uint8, on the device. A larger one stays in its shards, and the images of coming
batches are read and decoded while the network works. Both give the same batches.
"""

import zlib
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.compute.units import Worker
from pipeline.errors import PipelineError
from pipeline.store import tars
from pipeline.store.tensors import copy_to_device

Batch = tuple[Tensor, Tensor]


class Dataset(ABC):
    """Images and labels of one split, read by index."""

    lookahead = 0  # batches to `prefetch`, counted from the next one
    index_device = torch.device("cpu")  # where `read_batch` looks at its index

    @abstractmethod
    def __len__(self) -> int: ...

    def prefetch(self, index: Tensor) -> None:  # noqa: B027 - what is in memory needs none
        """Start reading images `index`, int64 (n,), in the background."""

    @abstractmethod
    def read_batch(self, index: Tensor) -> Batch:
        """Return images, uint8 (n,C,H,W), and labels, int64 (n,), -1 = none, on the worker's device."""


def open_dataset(directory: Path, split: str, ctx: Worker) -> Dataset:
    """Open a split: in memory if its pixels fit into `ctx.image_memory` bytes, otherwise from its shards."""
    index = tars.open_shards(directory)
    pixels = index.count_images(split) * index.facts["channels"] * index.facts["image_size"] ** 2
    if pixels <= ctx.image_memory:
        return MemoryDataset(*tars.load_images(directory, split), ctx.device)
    return ShardDataset(index, split, ctx)


class MemoryDataset(Dataset):
    def __init__(self, images: np.ndarray, labels: np.ndarray, device: torch.device):
        self.images, self.labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
        self.index_device = device

    def __len__(self) -> int:
        return len(self.images)

    def read_batch(self, index: Tensor) -> Batch:
        index = index.to(self.images.device)
        return self.images[index], self.labels[index]


class ShardDataset(Dataset):
    """Reads single images from shards by their offsets, and compares each with its crc32.

    The sha256 of sets of this size would take hours before the first step. wids, webdataset's package for indexed
    access, scans a tar again whenever it returns to it, which a random order over hundreds of tars does all the time.
    """

    lookahead = 4

    def __init__(self, index: tars.ShardManifest, split: str, ctx: Worker):
        shards = index.list_shards(split)
        self.offsets = np.concatenate([index.read_offsets(shard.name) for shard in shards])
        self.shard_of = np.repeat(np.arange(len(shards)), [shard.count for shard in shards])
        self.paths = [shard.path for shard in shards]
        self.device = ctx.device
        self.threads = ThreadPoolExecutor(ctx.cpus, thread_name_prefix="decode")
        self.pending: dict[bytes, list[Future[np.ndarray]]] = {}

    def __len__(self) -> int:
        return len(self.offsets)

    def prefetch(self, index: Tensor) -> None:
        key = index.numpy().tobytes()
        if key not in self.pending:
            self.pending[key] = [self.threads.submit(self._read_image, number) for number in index.tolist()]

    def read_batch(self, index: Tensor) -> Batch:
        self.prefetch(index)
        images = np.stack([image.result() for image in self.pending.pop(index.numpy().tobytes())])
        labels = self.offsets[index.numpy(), tars.LABEL]
        return copy_to_device(images, self.device), copy_to_device(labels, self.device)

    def _read_image(self, number: int) -> np.ndarray:
        shard = int(self.shard_of[number])
        offset, size, crc = self.offsets[number, : tars.LABEL].tolist()
        with self.paths[shard].open("rb") as file:
            file.seek(offset)
            png = file.read(size)
        if zlib.crc32(png) != crc:
            raise PipelineError(
                f"image {number} in {self.paths[shard]} is damaged (crc32); delete the tar and run `ddpm shard` again"
            )
        return tars.decode_png(png)
