"""Shards: round trip, repeatability, and every kind of damage seen and named."""

import numpy as np
import pytest
from conftest import flip_bit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import noise, write_shards

from pipeline.errors import PipelineError
from pipeline.store import tars
from pipeline.store.tars import Record

IMAGES = noise(13, 8, 8, 3)
RECORDS = [Record(f"train-{i:08d}", tars.encode_png(image), i % 7) for i, image in enumerate(IMAGES)]


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path, IMAGES, (5, 5, 3))


def test_what_is_no_picture_and_keys_out_of_order_are_refused_and_nothing_is_left(tmp_path):
    for shape, dtype in (((8, 8, 3), "f4"), ((3, 8, 8), "u1"), ((8, 8, 4), "u1"), ((8,), "u1")):
        with pytest.raises(ValueError, match="uint8"):
            tars.encode_png(np.zeros(shape, dtype))
    for keys in (("b", "a"), ("a", "a"), ("a.b",)):
        with pytest.raises(ValueError, match="keys ascend"):
            tars.write_tar(tmp_path / "x.tar", [Record(key, RECORDS[0].png, 0) for key in keys])
    assert not list(tmp_path.iterdir())


def test_a_shard_is_byte_identical_at_any_time(tmp_path, monkeypatch):
    one, other = (tmp_path / name / "x.tar" for name in "ab")
    first = tars.write_tar(one, RECORDS)
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert tars.write_tar(other, iter(RECORDS)) == first
    assert one.read_bytes() == other.read_bytes()
    assert first["count"] == 13 and first["bytes"] == one.stat().st_size
    assert list(tars.read_records(one, count=13)) == RECORDS


def test_webdataset_reads_the_shards(folder):
    from webdataset import WebDataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls"))
    assert [key for key, _, _ in samples] == [f"train-{i:08d}" for i in range(13)]
    assert [label for _, _, label in samples] == [i % 7 for i in range(13)]
    assert np.array_equal(np.stack([image for _, image, _ in samples]), IMAGES)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bounds=st.tuples(st.integers(0, 13), st.integers(0, 13)).filter(lambda b: b[0] < b[1]))
def test_any_range_is_a_slice_of_the_whole(folder, bounds):
    start, stop = bounds
    loaded, labels = tars.load_images(folder, "train", start, stop)
    assert loaded.dtype == np.uint8 and labels.dtype == np.int64
    assert np.array_equal(loaded, IMAGES[start:stop].transpose(0, 3, 1, 2))
    assert labels.tolist() == [i % 7 for i in range(start, stop)]


# Damage. A member is a header of 512 bytes and its data, filled up to whole blocks.

SHARD = "train-00001.tar"


def second_sample(tar: bytes) -> int:
    return tar.index(b"train-00000006.")


@pytest.mark.parametrize("place", [
    second_sample,  # at the boundary of a member
    lambda tar: second_sample(tar) + 100,  # in a header
    lambda tar: tar.index(b"IDAT", second_sample(tar)) + 9,
    lambda tar: len(tar.rstrip(b"\0")) + 512 - len(tar.rstrip(b"\0")) % 512,  # before the closing blocks
    lambda tar: 0,
])  # fmt: skip
def test_a_truncated_shard_is_named_with_and_without_its_manifest(folder, place):
    whole = (path := folder / SHARD).read_bytes()
    cut = place(whole)
    path.write_bytes(whole[:cut])
    with pytest.raises(PipelineError, match=f"{SHARD} has"):
        tars.load_images(folder, "train")
    with pytest.raises(PipelineError, match=SHARD):
        list(tars.read_records(path))
    # as long as before
    path.write_bytes(whole[: min(cut, len(whole.rstrip(b"\0")) - 1)].ljust(len(whole), b"\0"))
    with pytest.raises(PipelineError, match=f"{SHARD} does not match its sha256"):
        tars.load_images(folder, "train")
    if place == second_sample:
        with pytest.raises(PipelineError, match=f"{SHARD} holds 1 images, not 5"):
            list(tars.read_records(path, count=5))


@pytest.mark.parametrize("place", [
    lambda tar: tar.index(b"IDAT", second_sample(tar)) + 9,
    lambda tar: second_sample(tar) + 5,  # in a header
    lambda tar: tar.index(b".cls") + 512,  # in a label
    lambda tar: len(tar) - 1,  # in the padding
])  # fmt: skip
def test_a_flipped_bit_is_seen_and_named(folder, place):
    flip_bit(folder / SHARD, place((folder / SHARD).read_bytes()))
    with pytest.raises(PipelineError, match=f"{SHARD} does not match its sha256"):
        tars.load_images(folder, "train")
    assert len(tars.load_images(folder, "train", 0, 5)[0]) == 5, "another shard was not asked for"


def test_a_range_a_split_a_shard_or_a_manifest_that_is_not_there_is_named(folder):
    for start, stop in ((0, 14), (13, 13), (-1, 4), (5, 2)):
        with pytest.raises(PipelineError, match="has 13"):
            tars.load_images(folder, "train", start, stop)
    with pytest.raises(PipelineError, match=r"no test split.*data\.test_images"):
        tars.load_images(folder, "test")
    manifest = folder / "manifest.json"
    for break_it, fault in (
        ((folder / SHARD).unlink, f"{SHARD} is missing"),
        (lambda: manifest.write_text(manifest.read_text()[:100]), r"manifest\.json is damaged"),
        (manifest.unlink, "no finished shards"),
    ):
        break_it()
        with pytest.raises(PipelineError, match=fault):
            tars.open_shards(folder)
