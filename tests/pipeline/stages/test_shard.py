"""The shard stage: complete, repeatable, resumable, and never trusting a tar without its facts."""

import dataclasses
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import flip_bit, tiny_experiment
from image_files import encode, write_lmdb
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import sources
from pipeline.data.sources import lmdb
from pipeline.errors import PipelineError
from pipeline.stages import shard
from pipeline.store import tars
from pipeline.store.run import Place

DIGITS = DataConfig("digits", None, 8, 1, 10, 500, 0, "refuse", 0)


class OneFolder(Place):
    """Keeps the shards of every source in the same folder."""

    @property
    def data(self) -> Path:
        return self.storage / "data" / "any"


def run_in(storage: Path) -> Place:
    return OneFolder(storage, tiny_experiment(), "d" * 12, "e" * 12)


def of(data: DataConfig, run: Place) -> Place:
    return run.replace_experiment(dataclasses.replace(tiny_experiment(), data=data))


def do(data: DataConfig, run: Place, backwards: bool = False) -> list[str]:
    done = []
    for units in shard.STAGE.work(of(data, run)):
        for unit in reversed(units) if backwards else units:
            unit.body(None, *unit.args)
            done.append(unit.name)
    return done


def tar_bytes(run: Place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.data.glob("*.tar")}


@pytest.fixture
def run(tmp_path):
    return run_in(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    for i in range(20):
        file = tmp_path / "pictures" / ("even" if i % 2 == 0 else "odd") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(file)
    return DataConfig("folder", str(tmp_path / "pictures"), 8, 1, 2, 4, 6, "refuse", 0)


def test_digits_end_to_end(run):
    assert not shard.STAGE.is_done(of(DIGITS, run))
    names = ["train-00000.tar", "train-00001.tar", "train-00002.tar", "test-00000.tar"]
    assert do(DIGITS, run) == [f"shard {name}" for name in names]
    assert shard.STAGE.is_done(of(DIGITS, run))
    index = tars.open_shards(run.data)
    assert (index.count_images("train"), index.count_images("test")) == (1437, 360)
    assert index.facts["fingerprint"] == sources.compute_fingerprint(DIGITS, None)
    facts = {"image_size": 8, "channels": 1, "labels": 10, "source": "digits", "skipped": 0, "official": None}
    assert facts.items() <= index.facts.items()
    assert list(index.facts["files"]) == sorted(name for tar in names for name in (tar, tar[:-3] + "json"))
    assert index.facts["files"]["train-00002.tar"]["count"] == 437
    pixels, labels = tars.load_images(run.data, "test")
    assert pixels.shape == (360, 1, 8, 8) and np.bincount(labels).tolist() == [36] * 10


def test_shards_are_byte_identical_in_any_order_and_their_size_changes_no_index(tmp_path, pictures):
    """Nor are those of another size, left by a killed stage, taken for them."""
    first, second = run_in(tmp_path / "a"), run_in(tmp_path / "b")
    do(pictures, first)
    do(pictures, second, backwards=True)
    assert tar_bytes(first) == tar_bytes(second) and len(tar_bytes(first)) == 6
    manifest = (first.data / "manifest.json").read_bytes()
    assert manifest == (second.data / "manifest.json").read_bytes()
    assert pictures.path.encode() not in manifest, "it names no place"
    interrupt(dataclasses.replace(pictures, images_per_shard=5), third := run_in(tmp_path / "c"))
    do(dataclasses.replace(pictures, images_per_shard=100), third)
    for split in ("train", "test"):
        ours, theirs = tars.load_images(first.data, split), tars.load_images(third.data, split)
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_unit_travels_with_absolute_paths_and_its_own_keys_of_a_database(tmp_path, run, monkeypatch):
    """Who plans the shards reads the keys once: LSUN Bedroom's take seconds and 234 MB in each process."""
    write_lmdb(tmp_path / "set_train_lmdb", [encode(np.full((8, 8), i, np.uint8), "png") for i in range(20)])
    monkeypatch.chdir(tmp_path)
    work = shard.STAGE.work(of(DataConfig("lmdb", ".", 8, 1, 0, 4, 6, "refuse", 0), run))
    units = pickle.loads(pickle.dumps(next(work)))
    monkeypatch.chdir("/")
    monkeypatch.setattr(lmdb, "_list_image_keys", None)
    sources.open_source.cache_clear()
    for unit in units:
        unit.body(None, *unit.args)
    monkeypatch.chdir(tmp_path)
    assert next(work, None) is None and len(units) == 6
    levels = [tars.load_images(run.data, split)[0][:, 0, 0, 0].tolist() for split in ("train", "test")]
    assert sorted(levels[0] + levels[1]) == [*range(20)] and levels == [sorted(its) for its in levels]


def interrupt(data: DataConfig, run: Place) -> dict[str, bytes]:
    """The stage killed after its last unit but before its manifest."""
    for unit in next(shard.STAGE.work(of(data, run))):
        unit.body(None, *unit.args)
    assert not (run.data / "manifest.json").exists()
    return tar_bytes(run)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize("file", ["train-00001.tar", "train-00001.json"])
def test_a_resumed_stage_redoes_only_what_is_missing(pictures, run, file):
    whole = interrupt(pictures, run)
    for damage in (Path.unlink, cut, flip_bit) if file.endswith(".tar") else (Path.unlink, cut):
        (run.data / "manifest.json").unlink(missing_ok=True)
        damage(run.data / file)
        assert not shard.STAGE.is_done(of(pictures, run))
        assert do(pictures, run) == ["shard train-00001.tar"]
        assert tar_bytes(run) == whole and shard.STAGE.is_done(of(pictures, run))


def break_images(data: DataConfig, numbers: list[int]) -> None:
    for number in numbers:
        next(Path(data.path).rglob(f"{number:02d}.png")).write_bytes(b"no image")


def test_broken_images_up_to_the_limit_are_left_out(pictures, tmp_path, caplog):
    break_images(pictures, [3, 8, 11])
    data = dataclasses.replace(pictures, max_undecodable=3)
    first, second = run_in(tmp_path / "a"), run_in(tmp_path / "b")
    with caplog.at_level(logging.WARNING):
        do(data, first)
    assert all(f"{number:02d}.png does not decode" in caplog.text for number in (3, 8, 11))
    do(dataclasses.replace(data, max_undecodable=9), second, backwards=True)
    assert tar_bytes(first) == tar_bytes(second)
    index = tars.open_shards(first.data)
    assert index.count_images("train") + index.count_images("test") == 17 and index.facts["skipped"] == 3
    shown = [tars.load_images(first.data, split)[0][:, 0, 0, 0] for split in ("train", "test")]
    assert sorted(np.concatenate(shown)) == [10 * i for i in range(20) if i not in (3, 8, 11)]
    shards = index.list_shards("train")
    assert [shard.stop for shard in shards[:-1]] == [shard.start for shard in shards[1:]]


@pytest.mark.parametrize("one_shard", [True, False])
def test_more_broken_images_than_allowed_and_none_that_decodes_stop_the_stage(pictures, run, one_shard):
    """All in one shard, or over several of which none exceeds the limit."""
    source = sources.SOURCES["folder"](pictures)
    records = source.read_records("train", 0, source.splits["train"])
    train = [tars.decode_png(record.png)[0, 0, 0] // 10 for record in records]
    break_images(pictures, train[:3] if one_shard else train[:12:4])
    several = "one of 3 broken images where data.max_undecodable=2"
    with pytest.raises(PipelineError, match=r"\.png.*max_undecodable" if one_shard else several):
        do(dataclasses.replace(pictures, max_undecodable=2), run)
    break_images(pictures, list(range(20)))
    with pytest.raises(PipelineError, match="no image of the train split decodes"):
        do(dataclasses.replace(pictures, max_undecodable=20), run_in(run.storage / "other"))
    assert not [*run.storage.rglob("manifest.json")]
