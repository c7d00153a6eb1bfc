"""What lies in image sources and is no image, no split or not what it claims to be: each is named, or said once."""

import dataclasses
import gzip
import logging
import os
import pickle
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import flip_bit, one_cpu, tiny_experiment
from image_files import draw_numbered, encode, encode_numbered, noise, write_arrays, write_lmdb, write_parquet
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk
from pyarrow import parquet
from test_sources import assert_fingerprint_fails, assert_read_fails, config, numbers, pixels, read, reader

from pipeline.config import DataConfig
from pipeline.data import sources
from pipeline.data.sources import cifar10
from pipeline.data.sources.base import ImageSource
from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.stages import shard
from pipeline.store.tars import Record, encode_png, open_shards, write_tar


def seal(data: DataConfig, storage: Path) -> dict:
    place = make_place(dataclasses.replace(tiny_experiment(), data=data), storage)
    for units in shard.STAGE.work(place):
        one_cpu().run_units(units, lambda unit: None)
    return open_shards(place.data).facts


def write_batches(folder: Path, labels: list) -> Path:
    for name in cifar10.BATCHES:
        batch = {b"data": noise(len(labels), 3072), b"labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


ALL = [*range(12)]


@pytest.mark.parametrize(("rows", "changed", "official"), [
    (ALL, 0, True), ([*ALL[7::-1], *ALL[8:]], 0, True), ([0, 0, *ALL[2:]], 0, False), (ALL[:9], 0, False),
    (ALL, 1, False),
], ids=["same", "another order", "one image twice", "short", "one pixel"])  # fmt: skip
def test_cifar10_is_known_by_its_pixels(tmp_path, monkeypatch, rows, changed, official):
    images = noise(12, 32, 32, 3)
    parts = zip(("train", "test"), np.split(images.transpose(0, 3, 1, 2), [8]), strict=True)
    monkeypatch.setattr(cifar10, "PIXELS", {split: (len(x), cifar10.hash_images(x)) for split, x in parts})
    images[9, 5, 5, 1] ^= changed
    splits: dict[str, list] = {"train": [], "test": []}
    for number, part in enumerate(np.split(images[rows], 3)):
        records = [Record(str(i), encode_png(image), 1) for i, image in enumerate(part)]
        splits["test" if number == 2 else "train"].append(write_tar(tmp_path / f"{number}.tar", records))
    assert cifar10.is_official(tmp_path, splits) is official


def test_images_that_only_claim_to_be_cifar10_are_said_and_nested_labels_do_not_unfold(tmp_path, caplog):
    labels = [0, 0]
    for _ in range(30):
        labels = [labels, labels]
    assert_read_fails("is no CIFAR-10 batch", "cifar10", write_batches(tmp_path, labels), image_size=32)
    data = config("cifar10", write_batches(tmp_path, [0, 1, 2, 3]), image_size=32, labels=10)
    with caplog.at_level(logging.WARNING):
        assert seal(data, tmp_path)["official"] is False
    assert "other images than CIFAR-10" in caplog.text


def make(root: Path, sizes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(sizes.items()):
        images = encode_numbered(1, number) * count
        if name.endswith(".parquet"):
            write_parquet(root / name, images, None)
            continue
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            (root / name / f"{i}.png").write_bytes(image)
    return root


def open_set(root: Path, labels: int = 0) -> ImageSource:
    return reader("parquet" if any(root.rglob("*.parquet")) else "folder", root, labels=labels)


@pytest.mark.parametrize(("layout", "sizes", "classes"), [
    ({"train/cat": 4, "train/dog": 4, "val/cat": 2, "val/dog": 2}, (8, 4), ["cat", "dog"]),
    ({"train/a": 4, "validation/a": 2}, (4, 2), ["a"]),
    ({"Training Set/a": 4, "DEV_set/a": 2}, (4, 2), ["a"]),
    ({"imgs_train2017/a": 4, "imgs_val2017/a": 2}, (4, 2), ["a"]),
    ({"data/train/cat": 4, "data/train/dog": 1, "data/testing/cat": 2}, (5, 2), ["cat", "dog"]),
    ({"train/cat": 3, "train/dog": 3, "annotations": 0}, (6,), ["cat", "dog"]),
    ({"train/a": 4, "val/a": 1, "test/a": 2}, (4, 2), ["a"]),
    ({"train/a": 4, "test/a": 2, "extra/a": 3}, (4, 2), ["a"]),
    ({"airplane": 2, "car": 2, "train": 2}, (6,), ["airplane", "car", "train"]),
    ({"bullet_train": 2, "cat": 2, "test_tube": 2}, (6,), ["bullet_train", "cat", "test_tube"]),
    ({"mnist_train.parquet": 3, "mnist_test.parquet": 2}, (3, 2), []),
    ({"train-0.parquet": 3, "dev-0.parquet": 2, "extra-0.parquet": 1}, (3, 2), []),
    ({"data/TRAIN/0.parquet": 3, "data/Valid/0.parquet": 1}, (3, 1), []),
    ({"data/train-0.parquet": 6, "data/validation/0.parquet": 3}, (6, 3), []),
    ({"data/train-0.parquet": 6, "data/validation/0.parquet": 3, "test/0.parquet": 1}, (6, 1), []),
    ({"data/train-0.parquet": 6, "data/test-0.parquet": 3, "test/0.parquet": 1}, (6, 4), []),
    ({"a.parquet": 3, "b.parquet": 2}, (5,), []),
])  # fmt: skip
def test_one_rule_finds_the_splits(tmp_path, layout, sizes, classes):
    found = open_set(make(tmp_path, layout), len(classes))
    assert tuple(found.splits.values()) == sizes and list(found.classes) == classes


@pytest.mark.parametrize(("layout", "message"), [
    ({"cropped/train-0.parquet": 1, "full/train-0.parquet": 1}, r"several sets \(cropped, full\); set data\.path"),
    ({"cropped/train-0.parquet": 1, "full/test-0.parquet": 1}, r"several sets \(cropped, full\)"),
    ({"cat/train": 1, "cat/test": 1, "dog/train": 1, "dog/test": 1}, "several folders for a split .*data.path"),
    ({"val/cat": 2, "test/cat": 2}, "no train split, only test, val; set data.path"),
    ({"train": 1, "training": 1, "mnist_test": 1, "my_test": 1}, "several folders for a split"),
])  # fmt: skip
def test_a_layout_in_doubt_is_refused(tmp_path, layout, message):
    with pytest.raises(PipelineError, match=message):
        open_set(make(tmp_path, layout))


def test_what_is_passed_over_or_guessed_is_said_once(tmp_path, caplog, capsys):
    layout = {"train/cat": 3, "train/dog": 2, "train/empty": 0, "val/cat": 1, "test/cat": 2}
    root = make(tmp_path / "set", layout)
    for name in ("a.heic", "b.heic", "README", "labels.h5", "list.im", ".hidden"):
        (root / "train" / "cat" / name).write_text("no image")
    os.mkfifo(root / "train" / "dog" / "fifo.png")
    (root / "train" / "dog" / "again").symlink_to(root)
    with caplog.at_level(logging.WARNING):
        seal(config("folder", root, labels=4), tmp_path)
    kinds = ("2 .heic", "1 without extension", "1 .h5", "1 .im", "1 hidden", "1 no regular file (fifo.png)",
             "1 folder that lies here under another name", "1 in val", "empty holds no image",
             "data.labels=4, but no training image has the class 2, 3")  # fmt: skip
    assert [kind for kind in kinds if caplog.text.count(kind) != 1] == []
    assert "train 5 images, test 2 images; classes cat, dog" in capsys.readouterr().out


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    outside, root = make(tmp_path / "outside", {"b": 4, "c": 5}), make(tmp_path / "set", {"a": 3})
    for name in ("b", "c"):
        (root / name).symlink_to(outside / name)
        (outside / name / "loop").symlink_to(root)
    found = open_set(root, 3)
    assert (found.splits, found.classes) == ({"train": 12}, ["a", "b", "c"])
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "data").symlink_to(make(tmp_path / "blobs", {"train-0.parquet": 3}))
    assert reader("parquet", tmp_path / "hub").splits == {"train": 3}


def test_a_fifo_is_no_file_of_any_source_and_names_are_bytes(tmp_path):
    names = {"parquet": "train-0.parquet", "npy": "images.npy", "lmdb": "data.mdb", "cifar10": "data_batch_1"}
    for source, name in names.items():
        os.mkfifo(tmp_path / name)
        for path in (tmp_path, tmp_path / name):
            assert_fingerprint_fails(tmp_path.name, source, path, image_size=32)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(encode(noise(8, 8, 3)))
    assert sources.compute_fingerprint(config("folder", tmp_path), None)
    assert_read_fails(r"caf\\xe9\.png has 8x8 pixels.*resize=crop", "folder", tmp_path, image_size=9)


@pytest.mark.parametrize(("names", "labels", "expected"), [
    (["0.png", "1.png"], 0, "9e759a57c5ed"), (["a/0.png", "b/0.png"], 2, "2034ea28d7c9"),
    (["train/a/0.png", "test/a/0.png"], 1, "27721d3f2776"),
    (["train/a/0.png", "train/b/0.png"], 2, "1b538bed77e4"),
    (["train/a/0.png", "test/a/0.png", "val/a/0.png"], 0, "27721d3f2776"),
    (["car/0.png", "train/0.png"], 2, "98d2331b1c3b"),
    (["bullet_train/0.png", "cat/0.png", "test_tube/0.png"], 3, "2c7197c5fd1e"),
    (["train/a/0.png", "notes/a.txt"], 0, "23adbc7645c4"),
    (["data/train-0.parquet", "data/test-0.parquet"], 0, "4e9ea865bdf0"),
    (["trainset.parquet", "testset.parquet"], 0, "1a2e7121ddf8"),
    (["train/0.parquet", "validation/0.parquet"], 0, "0bfd9c66122e"),
    (["a.parquet", "b.parquet"], 0, "13a8abbce86b"), (["train/cat/0.png", "val/cat/0.png"], 0, ""),
    (["train/cat/0.png", "train/dog/0.png", "notes/a.txt"], 2, ""),
    (["cifar10-train.parquet", "cifar10-validation.parquet"], 0, ""),
])  # fmt: skip
def test_fingerprints_move_only_where_a_set_was_not_read_rightly_before(tmp_path, names, labels, expected):
    """The expected ones are of version ef6030f."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = open_set(tmp_path, labels)
    now, found.layout = found.compute_fingerprint(), ""
    assert now.startswith(expected) and (now == found.compute_fingerprint()) == bool(expected)


CLEAR = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
IN_A_CHANNEL = {"RGBA": CLEAR, "LA": Image.new("LA", (8, 8), (77, 0)), "PA": CLEAR.quantize(4)}
BY_COLOUR = {  # bits, PNG's type of colour, a pixel or eight, the transparent colour
    "tRNS of L": (8, 0, bytes([77] * 8), [77]),
    "tRNS of 1": (1, 0, b"\xff", [1]),
    "tRNS of I;16": (16, 0, struct.pack(">H", 7777) * 8, [7777]),
    "tRNS of RGB": (8, 2, bytes([200, 0, 0] * 8), [200, 0, 0]),
    "tRNS of 16-bit RGB": (16, 2, struct.pack(">3H", 51400, 7, 9) * 8, [51400, 7, 9]),
}


@pytest.mark.parametrize("kind", [*IN_A_CHANNEL, *BY_COLOUR])
def test_transparent_pixels_are_refused_or_laid_on_a_background(tmp_path, kind):
    with (tmp_path / "a.png").open("wb") as png:
        if kind in IN_A_CHANNEL:
            IN_A_CHANNEL[kind].save(png, "png")
        else:
            bits, colour, row, key = BY_COLOUR[kind]
            png.write(b"\x89PNG\r\n\x1a\n")
            putchunk(png, b"IHDR", struct.pack(">2I5B", 8, 8, bits, colour, 0, 0, 0))
            putchunk(png, b"tRNS", struct.pack(f">{len(key)}H", *key))
            putchunk(png, b"IDAT", zlib.compress((b"\0" + row) * 8))
            putchunk(png, b"IEND")
    for channels in (1, 3):
        message = r"a\.png is transparent in part; set data\.background"
        assert_read_fails(message, "folder", tmp_path, channels=channels)
        for background, level in (("white", 255), ("black", 0)):
            found = pixels(config("folder", tmp_path, channels=channels, background=background))
            assert set(found.flat) == {level}


@pytest.mark.parametrize("chunk", ["eXIf", "zTXt"])
@pytest.mark.parametrize("size", [8, 16])
def test_an_orientation_counts_wherever_it_stands(tmp_path, size, chunk):
    image = Image.fromarray(np.repeat(np.arange(size, dtype=np.uint8)[:, None] * 15, size, axis=1))
    exif, info = Image.Exif(), PngInfo()
    exif[0x0112] = 3  # upside down
    raw = exif.tobytes()
    info.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True)
    image.save(tmp_path / "a.png", **({"exif": exif} if chunk == "eXIf" else {"pnginfo": info}))
    for channels in (1, 3):
        column = pixels(config("folder", tmp_path, channels=channels, resize="crop"))[0, 0, :, 0].astype(int)
        assert (np.diff(column) < 0).all() and (size > 8 or column.tolist() == list(range(105, -1, -15)))


WHOLE = encode_png(noise(8, 8, 3))
AT = WHOLE.index(b"IDAT") + 60
DAMAGED = {
    "truncated": WHOLE[:100], "flipped": WHOLE[:AT] + bytes([WHOLE[AT] ^ 1]) + WHOLE[AT + 1 :], "empty": b"",
    "text": b"hello", "cut before the end": WHOLE[:-12], "jpeg": encode(noise(64, 64, 3), "jpeg")[:-500],
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_an_image_that_does_not_decode_is_named(tmp_path, kind):
    make(tmp_path, {"ant": 9, "bee": 9})
    (tmp_path / "bee" / "4.png").write_bytes(DAMAGED[kind])
    message = r"bee.4\.png does not decode \(.+\); .*data.max_undecodable"
    assert_read_fails(message, "folder", tmp_path, resize="crop")
    source, told = reader("folder", tmp_path, resize="crop"), []
    rest = list(source.read_records("train", 0, 18, lambda *args: told.append(args)))
    assert (len(rest), len(told), len({record.key for record in rest})) == (17, 1, 17)


def test_a_picture_of_too_many_pixels_is_refused_without_pillows_words(tmp_path, recwarn):
    Image.new("1", (13000, 13000)).save(tmp_path / "a.png")
    assert_read_fails(r"a\.png does not decode \(more than 89,478,485 pixels\)", "folder", tmp_path)
    assert not recwarn.list


def test_columns_may_hold_bare_bytes_and_that_of_the_images_can_be_named(tmp_path):
    labels = pyarrow.array([0, 1, 2], pyarrow.uint8())
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        table = pyarrow.table({"jpg": pyarrow.array(encode_numbered(3), kind), "label": labels})
        parquet.write_table(table, tmp_path / "a.parquet")
        assert numbers(config("parquet", tmp_path)) == [0, 1, 2]
        assert sources.open_source(config("parquet", tmp_path)).read_labels("train").tolist() == [0, 1, 2]
    images = {n: [encode_png(np.full((8, 8, 3), x, np.uint8))] for n, x in (("left", 1), ("right", 2))}
    parquet.write_table(pyarrow.table(images), tmp_path / "a.parquet")
    assert pixels(config("parquet", tmp_path, image_column="right")).max() == 2
    for column in (None, "middle"):
        assert_read_fails("left .*right .*; set data.image_col", "parquet", tmp_path, image_column=column)


@pytest.mark.parametrize("source", ["npy", "parquet"])
def test_the_first_images_of_a_split_mix_the_classes(tmp_path, source):
    labels, data = np.repeat(np.arange(4), 10), config(source, tmp_path, labels=4)
    for part in ("train", "test"):
        write_arrays(tmp_path, **{f"{part}_images": draw_numbered(40), f"{part}_labels": labels})
        write_parquet(tmp_path / f"{part}-0.parquet", encode_numbered(40), labels.tolist())
    for part in ("train", "test"):
        classes, found = [record.label for record in read(data, part)], numbers(data, part)
        assert len(set(classes[:10])) == 4 and sorted(found) == list(range(40))
        assert [number // 10 for number in found] == classes


@pytest.mark.parametrize("shape", [(10**22, 8, 8), (-5, 8, 8), (2**40, 8, 8), (True, 8, 8)])
def test_an_array_of_an_impossible_shape_is_named(tmp_path, shape):
    with (tmp_path / "images.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(bytes(64))
    assert_fingerprint_fails(r"^(?!.*pickle).*images\.npy is no readable array of numbers", "npy", tmp_path)


@pytest.mark.parametrize("kind", ["unpacked", "batch", "extended header", "other"])
def test_cifar10_is_refused_by_a_size_that_no_batch_has(tmp_path, kind):
    place, size, name = tmp_path / "a.tar.gz", 6 * 2**30, "big" if kind == "other" else "data_batch_1"
    if kind == "unpacked":
        place = write_batches(tmp_path, [0])
        os.truncate(place / name, size)
    else:
        header = tarfile.TarInfo(name)
        header.size, header.type = size, tarfile.XHDTYPE if kind == "extended header" else tarfile.REGTYPE
        with gzip.open(place, "wb") as file:
            file.write(header.tobuf() + bytes(2**20))
    assert_fingerprint_fails(f"{name} has 6,442,450,944 bytes", "cifar10", place, image_size=32)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_database_is_named(tmp_path, seed):
    rng = np.random.default_rng(seed)
    file = write_lmdb(tmp_path, [rng.bytes(300) for _ in range(200)]) / "data.mdb"
    for place in rng.integers(0, file.stat().st_size, 200):
        flip_bit(file, place)
    assert_read_fails(r"data\.mdb", "lmdb", tmp_path)


def test_splits_of_lsun_are_databases_and_those_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    dogs, lsun = tmp_path / "dogs", tmp_path / "lsun"
    write_lmdb(dogs / "Dog-Testing", [b"image"])
    assert_read_fails("nor a single train database", "lmdb", dogs)
    for name, count in (("Cat-Training", 3), ("Cat-Testing", 2)):
        write_lmdb(dogs / name, [b"image"] * count)
    found = reader("lmdb", dogs)
    assert (found.splits, found.skipped) == ({"train": 3, "test": 2}, {"database Dog-Testing": 1})
    assert reader("lmdb", dogs / "Cat-Testing").splits == {"train": 2}
    write_lmdb(lsun / "church_outdoor_train_lmdb", encode_numbered(20))
    write_lmdb(lsun / "church_outdoor_val_lmdb", encode_numbered(5, 20))
    forms = [config("lmdb", lsun), config("lmdb", lsun / "church_outdoor_train_lmdb", test_images=3)]
    for data in forms:
        assert (numbers(data), numbers(data, "test")) == ([*range(20)], [*range(20, 25)])
    first, second = (sources.compute_fingerprint(data, None) for data in forms)
    assert first == second
    (lsun / "church_outdoor_val_lmdb" / "data.mdb").unlink()
    assert sources.compute_fingerprint(forms[0], None) != first
    write_lmdb(lsun / "cat_train_lmdb", [encode_numbered(1)[0], b"no image"])
    assert_read_fails(r"data\.mdb key b'0+3d1' does not decode", "lmdb", lsun / "cat_train_lmdb")
    assert_read_fails(r"b'0+' has no label.*set data\.labels=0", "lmdb", lsun / "cat_train_lmdb", labels=3)
    message = r"cat_train_lmdb, church_outdoor_train_lmdb\); set data\.path to one"
    assert_fingerprint_fails(message, "lmdb", lsun)
    assert_fingerprint_fails(r"nowhere has no data\.mdb", "lmdb", lsun / "nowhere")
    for keep, reason in ((50, "is no readable LMDB"), (12_000, "is cut short")):  # it is never mapped
        file = write_lmdb(tmp_path / f"cut-{keep}", [bytes(9000), bytes(9000)]) / "data.mdb"
        file.write_bytes(file.read_bytes()[:keep])
        assert_fingerprint_fails(rf"data\.mdb {reason} .*fetch it again", "lmdb", file.parent)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert_fingerprint_fails(r"data\.source=lmdb needs the package lmdb: pip install lmdb", "lmdb", lsun)
