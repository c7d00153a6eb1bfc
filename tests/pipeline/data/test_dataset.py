"""Training reads the same batches from memory and from the tars."""

import json

import numpy as np
import pytest
import torch
from conftest import flip_bit
from image_files import write_shards

from pipeline.compute.units import Worker
from pipeline.data.dataset import MemoryDataset, ShardDataset, open_dataset
from pipeline.errors import PipelineError
from pipeline.store import tars
from pipeline.store.files import write_json


def context(image_memory=0):
    return Worker(torch.device("cpu"), cpus=2, image_memory=image_memory)


@pytest.fixture(params=[4, 0], ids=["labelled", "unlabelled"])
def folder(tmp_path, request):
    images = np.random.default_rng(0).integers(0, 256, (13, 9, 9, 3), dtype=np.uint8)
    return write_shards(tmp_path, images, (7, 5, 1), request.param)


def test_memory_and_tars_give_the_same_batches_and_pixels_decide(folder):
    small, large = open_dataset(folder, "train", context(2**20)), open_dataset(folder, "train", context())
    assert (type(small), type(large)) == (MemoryDataset, ShardDataset) and len(small) == len(large) == 13
    for index in (torch.randperm(13), torch.tensor([12, 0, 7, 7]), torch.tensor([6])):
        for ours, theirs in zip(small.read_batch(index), large.read_batch(index), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    pixels = 13 * 3 * 9 * 9
    assert isinstance(open_dataset(folder, "train", context(pixels)), MemoryDataset)
    assert isinstance(open_dataset(folder, "train", context(pixels - 1)), ShardDataset)
    batches = torch.randperm(13).split(4)
    for index in (*batches, *batches):  # twice is once
        large.prefetch(index)
    for index in reversed(batches):  # a prefetched batch is the one that was asked for
        images, _ = large.read_batch(index)
        assert torch.equal(images, torch.from_numpy(tars.load_images(folder, "train")[0])[index])
    assert not large.pending


def test_a_damaged_image_is_named_and_an_index_of_another_tar_refused(folder):
    file = folder / "train-00001.tar"
    flip_bit(file, tars.open_shards(folder).read_offsets(file.name)[2, tars.OFFSET] + 60)
    dataset = open_dataset(folder, "train", context())
    dataset.read_batch(torch.tensor([0, 7, 8, 10, 12]))
    with pytest.raises(PipelineError, match=r"image 9 in .*train-00001.tar is damaged"):
        dataset.read_batch(torch.tensor([9]))
    (folder / "train-00000.json").write_text((folder / "train-00001.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    for fault in ("has .* bytes, its manifest says", "is not the index of train-00000.tar"):
        with pytest.raises(PipelineError, match=f"train-00000.json {fault}"):
            open_dataset(folder, "train", context())
        manifest["files"].pop("train-00000.json", None)  # as older manifests are
        write_json(folder / "manifest.json", manifest)
