"""What lies in image sources and is no image, no split or not what it claims to be: each is named, or said once."""

import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import one_cpu, tiny_experiment

from pipeline.config import DataConfig
from pipeline.data.sources import cifar10
from pipeline.engine.find import make_place
from pipeline.stages import shard
from pipeline.store.tars import Record, encode_png, open_shards, write_tar


def config(source: str, path: Path, **changes: Any) -> DataConfig:
    return dataclasses.replace(DataConfig(source, str(path), 8, 3, 0, 100, 0, "refuse", 0), **changes)


def seal(data: DataConfig, storage: Path) -> dict[str, Any]:
    """The facts of the manifest that the shard stage writes."""
    place = make_place(dataclasses.replace(tiny_experiment(), data=data), storage)
    for units in shard.STAGE.work(place):
        one_cpu().map_units(units, lambda unit: None)
    return open_shards(place.data).facts


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


# What is CIFAR-10


def write_tars(folder: Path, images: np.ndarray) -> dict:
    """Two training tars of four images each and a test tar of four, as the shard stage writes them."""
    names = {"train": ["a.tar", "b.tar"], "test": ["c.tar"]}
    parts = iter(np.split(images, 3))
    return {
        split: [write_tar(folder / name, (Record(str(i), encode_png(x), 1) for i, x in enumerate(next(parts))))
                for name in of_split]
        for split, of_split in names.items()
    }  # fmt: skip


@pytest.mark.parametrize("case", ["same", "another order", "one pixel", "one image twice", "short"])
def test_cifar10_is_known_by_its_pixels(tmp_path, monkeypatch, case):
    images = noise(12, 32, 32, 3)
    chw = images.transpose(0, 3, 1, 2)
    digests = {
        split: (len(x), cifar10.hash_images(x)) for split, x in (("train", chw[:8]), ("test", chw[8:]))
    }
    monkeypatch.setattr(cifar10, "PIXELS", digests)
    if case == "another order":
        images[:8] = images[7::-1]
    elif case == "one pixel":
        images[9, 5, 5, 1] ^= 1
    elif case == "one image twice":
        images[1] = images[0]
    elif case == "short":
        images = images[:9]
    official = cifar10.is_official(tmp_path, write_tars(tmp_path, images))
    assert official == (case in ("same", "another order"))


def test_images_that_only_claim_to_be_cifar10_are_said(tmp_path, caplog):
    for name in cifar10.BATCHES:
        (tmp_path / name).write_bytes(
            pickle.dumps({b"data": noise(4, 3072), b"labels": [0, 1, 2, 3]}, protocol=2)
        )
    with caplog.at_level(logging.WARNING):
        assert seal(config("cifar10", tmp_path, image_size=32, labels=10), tmp_path)["official"] is False
    assert "not CIFAR-10's" in caplog.text
