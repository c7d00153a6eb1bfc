"""Sources: what they read, what they refuse and how they name it, and fingerprints of content."""

import dataclasses
import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_files import draw_numbered, encode_numbered, noise, save, write_arrays, write_parquet, write_set
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data import sources
from pipeline.data.sources import base, cifar10
from pipeline.errors import PipelineError
from pipeline.store.tars import decode_png

CIFAR10 = Path(__file__).parents[4] / "shared" / "data" / "cifar10"


def config(source: str, path=None, **changes) -> DataConfig:
    common = DataConfig(source, path and str(path), 8, 3, 0, 100, 0, "refuse", 0)
    return dataclasses.replace(common, **changes)


def reader(*words, **changes) -> base.ImageSource:
    data = config(*words, **changes)
    return sources.SOURCES[data.source](data)


def read(data: DataConfig, split: str = "train", size: int = 10**9) -> list:
    source = sources.SOURCES[data.source](data)
    n = source.splits[split]
    return [r for a in range(0, n, size) for r in source.read_records(split, a, min(a + size, n))]


def pixels(data: DataConfig, split: str = "train") -> np.ndarray:
    return np.stack([decode_png(record.png) for record in read(data, split)])


def numbers(data: DataConfig, split: str = "train") -> list[int]:
    return (pixels(data, split)[:, 0, 0, 0] // 6).tolist()


def assert_fingerprint_fails(message: str, *words, **changes) -> None:
    with pytest.raises(PipelineError, match=message):
        sources.compute_fingerprint(config(*words, **changes), None)


def assert_read_fails(message: str, *words, **changes) -> None:
    with pytest.raises(PipelineError, match=message):
        read(config(*words, **changes))


def write_numbered(source: str, root: Path, count: int = 18) -> Path:
    """Numbered images, each of the class that remains of its number divided by 3."""
    return write_set(source, root, draw_numbered(count), np.arange(count) % 3)


def test_the_permutation_is_fixed():
    """Golden values, from Philox4x64-10 with key 0: they must never change, or every split would."""
    assert sorted(base.make_fixed_permutation(1000)) == list(range(1000))
    assert base.make_fixed_permutation(10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


@pytest.mark.parametrize(
    "file", ["folder", "npy", "npy/images.npy", "lmdb", "lmdb/data.mdb", "parquet", "parquet/set.parquet"]
)
def test_held_out_images_complete_the_train_split(tmp_path, file):
    source = file.partition("/")[0]
    write_numbered(source, tmp_path / source, 25)
    data = config(source, tmp_path / file, test_images=5, labels=0 if source == "lmdb" else 3)
    test, train = numbers(data, "test"), numbers(data)
    assert len(test) == 5 and sorted(test + train) == list(range(25)) and numbers(data, "test") == test
    assert (train == sorted(train)) == (source in ("lmdb", "parquet"))  # the others are shuffled
    assert source == "lmdb" or [record.label for record in read(data)] == [number % 3 for number in train]
    assert read(data, size=3) == read(data, size=7) == read(data)
    assert {record.label for record in read(dataclasses.replace(data, labels=0))} == {None}
    assert_read_fails(r"has 25 images; .*=25 leaves none", source, tmp_path / file, test_images=25)


@pytest.mark.parametrize("source", ["folder", "npy", "lmdb", "parquet"])
def test_fingerprints_follow_content_and_names_not_place(tmp_path, source):
    made, moved = write_numbered(source, tmp_path / "made"), tmp_path / "moved"
    before = sources.compute_fingerprint(config(source, made), None)
    shutil.copytree(made, moved)
    assert sources.compute_fingerprint(config(source, moved), None) == before
    file = min(moved.rglob("*.*"))
    if source == "parquet":  # its footer stands at its end
        write_parquet(file, encode_numbered(18), None)
    else:
        file.write_bytes(file.read_bytes() + b"\0")
    assert sources.compute_fingerprint(config(source, moved), None) != before
    if source == "folder":
        (made / "ant").rename(made / "ape")  # another name of a class
        assert sources.compute_fingerprint(config(source, made), None) != before


def test_a_fingerprint_is_computed_once_for_unchanged_files(tmp_path, monkeypatch):
    cache, data = tmp_path / "fingerprints.json", config("folder", write_numbered("folder", tmp_path / "set"))
    first = sources.compute_fingerprint(data, cache)
    with monkeypatch.context() as patch:
        patch.setattr(base, "hash_file", None)  # nothing is read again
        assert sources.compute_fingerprint(data, cache) == first
    file = tmp_path / "set" / "ant" / "0.png"
    save(file, noise(8, 8, 3))
    changed = sources.compute_fingerprint(data, cache)
    assert changed != first
    os.utime(file, ns=(1, 1))  # touched, not changed
    assert sources.compute_fingerprint(data, cache) == changed
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert file.stat().st_size == size and sources.compute_fingerprint(data, cache) != changed


def test_digits_are_scikit_learns_split_evenly():
    from sklearn.datasets import load_digits

    data, digits = config("digits", channels=1, labels=10), load_digits()
    train, test = (read(data, split) for split in ("train", "test"))
    assert len(train) == 1437 and np.bincount([record.label for record in test]).tolist() == [36] * 10
    expected = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)
    assert expected.min() == 0 and expected.max() == 255
    both = sorted((decode_png(record.png).tobytes(), record.label) for record in train + test)
    assert both == sorted((image.tobytes(), int(n)) for image, n in zip(expected, digits.target, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"CIFAR-10's parquet files are not in {CIFAR10}")
def test_cifar10_test_split_has_its_known_mean_and_digest():
    images = pixels(config("cifar10", CIFAR10, image_size=32, labels=10), "test")
    assert (len(images), cifar10.hash_images(images)) == cifar10.PIXELS["test"]
    means = np.mean([image.mean(axis=(1, 2)) for image in images], axis=0) / 255
    assert np.allclose(means, [0.494214, 0.485131, 0.450409], atol=1e-6)


def test_parquet_that_cannot_be_used_is_named(tmp_path):
    file = tmp_path / "train-0.parquet"
    assert_fingerprint_fails(r"holds no train-\*\.parquet", "cifar10", tmp_path)
    assert_fingerprint_fails("nowhere does not exist", "cifar10", tmp_path / "nowhere")
    write_parquet(file, [*encode_numbered(2), None], None)
    assert_read_fails(r"train-0\.parquet row 2 \(2\.png\) does not decode", "parquet", tmp_path)
    message = r"train-0\.parquet has no column 'label', only img; .*labels=0"
    assert_read_fails(message, "cifar10", tmp_path, labels=10)
    write_parquet(file, encode_numbered(1), None, mask=[{"bytes": b""}])
    assert_read_fails(r"train-0\.parquet has 2 columns of encoded images, not one: img", "parquet", tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    assert_fingerprint_fails(r"train-0\.parquet is no readable parquet", "cifar10", tmp_path)


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes that Python 2's cPickle and NumPy 1 wrote into the official batches."""
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(K\x01" + struct.pack("<cHcH", b"M", len(data), b"M", data.shape[1]) + b"\x86" + dtype + b"\x89"
    state += b"T" + struct.pack("<i", data.size) + data.tobytes() + b"tb"
    items = b"".join(b"K" + bytes([label]) for label in labels)
    return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels](" + items + b"eu."


@pytest.fixture
def batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, (name, rows) in enumerate(zip(cifar10.BATCHES, np.split(noise(24, 3072), 6), strict=True)):
        (folder / name).write_bytes(python2_pickle(rows, [number, 1, 2, 9]))
    return folder


def pack(batches: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, arcname="cifar-10-batches-py")
    return archive


def test_official_archive_equals_its_unpacked_folder_and_broken_batches_are_named(batches, tmp_path):
    archive, expected = pack(batches, tmp_path / "elsewhere.tar.gz"), noise(24, 3072).reshape(24, 3, 32, 32)
    forms = [config("cifar10", path, image_size=32, labels=10) for path in (archive, batches, batches.parent)]
    assert np.array_equal(pixels(forms[1]), expected[:20])
    assert np.array_equal(pixels(forms[1], "test"), expected[20:])
    assert [r.label for r in read(forms[1])] == [label for n in range(5) for label in (n, 1, 2, 9)]
    assert read(forms[0]) == read(forms[1]) == read(forms[2])
    assert len({sources.compute_fingerprint(data, None) for data in forms}) == 1
    archive.write_bytes(archive.read_bytes()[:5000])
    assert_fingerprint_fails(r"elsewhere\.tar\.gz cannot be read", "cifar10", archive)
    broken = batches / "data_batch_2"
    broken.write_bytes(broken.read_bytes()[:1000])
    assert_read_fails("data_batch_2 is no CIFAR-10 batch", "cifar10", batches, image_size=32)
    broken.unlink()
    assert_fingerprint_fails("lacks data_batch_2", "cifar10", batches)


def test_the_genuine_archive_is_known_before_it_is_here():
    from torchvision.datasets import CIFAR10 as Reference

    assert dict(Reference.train_list + Reference.test_list) == cifar10.BATCHES
    assert Reference.url == cifar10.ADDRESS and Reference.tgz_md5 == cifar10.ARCHIVE_MD5
    assert len(sources.compute_fingerprint(config("cifar10", None, image_size=32, labels=10), None)) == 64


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("harmful, name", [
    (Harmful(), "posix.system"), (np.array([Harmful()], dtype=object), "posix.system"),
    (len, "__builtin__.len"), (Path("x"), "pathlib"), (np.random.default_rng(0), "numpy.random"),
])  # fmt: skip
def test_the_unpickler_refuses_by_name_and_runs_nothing(batches, tmp_path, monkeypatch, harmful, name):
    monkeypatch.chdir(tmp_path)
    (batches / "data_batch_3").write_bytes(pickle.dumps({b"data": harmful, b"labels": [0]}, protocol=2))
    message = rf"data_batch_3 is no CIFAR-10 batch \(it asks for {name}"
    assert_read_fails(message, "cifar10", batches, image_size=32)
    assert not (tmp_path / "harmed").exists()


def test_a_download_is_compared_with_its_md5_and_fetched_once(batches, tmp_path, monkeypatch):
    served, downloads = pack(batches, tmp_path / "cifar-10-python.tar.gz"), tmp_path / "downloads"
    data = config("cifar10", image_size=32, labels=10)
    downloads.mkdir()
    monkeypatch.setattr(cifar10, "ADDRESS", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(PipelineError, match=r"cannot be downloaded .*set data\.path"):
        sources.download_source(data, downloads)
    monkeypatch.setattr(cifar10, "ADDRESS", served.as_uri())
    with pytest.raises(PipelineError, match=r"has md5 .* run the command again"):
        sources.download_source(data, downloads)
    assert not list(downloads.iterdir())
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(served.read_bytes()).hexdigest())
    (downloads / served.name).write_bytes(b"half")  # of an earlier download
    assert len(read(located := sources.download_source(data, downloads))) == 20
    monkeypatch.setattr(cifar10, "ADDRESS", "http://127.0.0.1:9/not-fetched-twice")
    assert sources.download_source(data, downloads).path == located.path


def test_classes_are_numbered_in_order_of_their_folders_and_what_is_none_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_fingerprint_fails("has no images in its train split", "folder", tmp_path / "empty")
    assert_fingerprint_fails("is no folder", "folder", tmp_path / "nowhere")
    (tmp_path / "empty" / "a.png").symlink_to("nowhere.png")
    assert_fingerprint_fails(r"a\.png cannot be read \(No such file", "folder", tmp_path / "empty")
    train = write_numbered("folder", tmp_path / "train")
    (train / "ant" / "notes.txt").write_text("no image")
    save(train / ".thumbnails" / "0.png", noise(8, 8, 3))
    save(tmp_path / "test" / "dog" / "0.png", noise(8, 8, 3))
    data = config("folder", tmp_path, labels=3)
    labels = [record.label for record in read(data)]
    assert len(labels) == 18 and len({*labels[:9]}) == 3  # shuffled: any first part mixes the classes
    with pytest.raises(PipelineError, match=r"dog.0\.png has the class 'dog', which train/ lacks"):
        read(data, "test")
    message = r"cat.\d+\.png has the label 2, but data.labels=2 allows 0 to 1"
    assert_read_fails(message, "folder", tmp_path, labels=2)
    save(train / "loose.png", noise(8, 8, 3))
    assert_read_fails(r"loose\.png lies in no class folder.*data.labels=0", "folder", tmp_path, labels=3)


def test_png_that_fits_is_passed_through_and_all_else_is_made_to_fit(tmp_path):
    """Other sizes are cropped at the centre and resized with antialiasing."""
    original = save(tmp_path / "a.png", noise(8, 8, 3), compress_level=0).read_bytes()
    assert read(config("folder", tmp_path))[0].png == original
    grey = np.asarray(Image.fromarray(noise(8, 8, 3)).convert("L"))
    assert np.array_equal(pixels(config("folder", tmp_path, channels=1))[0, 0], grey)
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    save(tmp_path / "a.png", levels)
    assert np.array_equal(pixels(config("folder", tmp_path, channels=1))[0, 0], levels >> 8), "of 16 bits"
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = (10, 20, 30)  # the central square
    save(tmp_path / "a.png", wide)
    found = pixels(config("folder", tmp_path, resize="crop"))[0]
    assert np.array_equal(found, np.broadcast_to(np.array([10, 20, 30])[:, None, None], (3, 8, 8)))
    assert_read_fails(r"a\.png has 48x16 pixels, but data.image_size=8; .*resize=crop", "folder", tmp_path)
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255  # a chessboard of pixels averages to grey
    save(tmp_path / "a.png", board.astype(np.uint8))
    found = pixels(config("folder", tmp_path, channels=1, resize="crop"))
    assert np.abs(found.astype(int) - 127).max() <= 3


@pytest.mark.parametrize("file", ["CMYK.tiff", "RGB.jpg", "L.webp", "P.PNG", "1.png", "RGBA.png", "LA.png"])
def test_any_mode_in_the_formats_that_have_it(tmp_path, file):
    Image.new("RGB", (8, 8), "white").convert(file.partition(".")[0]).save(tmp_path / file)
    for channels in (1, 3):
        found = pixels(config("folder", tmp_path, channels=channels))
        assert found.shape == (1, channels, 8, 8) and found.min() >= 254
    png = read(config("folder", tmp_path))[0].png
    assert Image.open(io.BytesIO(png)).mode == "RGB"  # a palette PNG of the right size is encoded anew


def test_npy_labels_of_every_form_splits_and_names(tmp_path):
    rows, eye = np.arange(12) % 4, np.eye(4)
    for labels in (rows, rows[:, None].astype(np.uint8), eye[rows], eye.astype(np.int64)[rows]):
        data = config("npy", write_arrays(tmp_path, images=draw_numbered(12), labels=labels), labels=4)
        assert [record.label for record in read(data)] == [number % 4 for number in numbers(data)]
    images = noise(12, 8, 8, 3)
    two = write_arrays(tmp_path / "two", train_images=images[:8], test_images=images[8:])
    assert np.array_equal(pixels(config("npy", two), "test"), images[8:].transpose(0, 3, 1, 2))
    named = write_arrays(tmp_path / "x", sprites=images, sprites_labels=np.zeros(12, int)) / "sprites.npy"
    assert len(read(config("npy", named, labels=1))) == 12
    grey = config("npy", write_arrays(tmp_path / "grey", images=noise(5, 8, 8)), channels=1)
    assert pixels(grey).shape == (5, 1, 8, 8)  # without an axis of channels
    with pytest.raises(PipelineError, match=r"train image \d has 1 channel\(s\), but data.channels=3"):
        read(dataclasses.replace(grey, channels=3))
    file = two / "train_images.npy"
    file.write_bytes(file.read_bytes()[:-1])
    assert_fingerprint_fails(r"train_images\.npy is no readable array", "npy", two)


FIVE = noise(5, 8, 8, 3)


@pytest.mark.parametrize(("images", "labels", "message"), [
    (np.zeros((5, 8, 8, 3), np.float32), np.arange(5), r"images\.npy is float32"),
    (np.zeros((5, 3, 8, 8), np.uint8), np.arange(5), r"images\.npy is uint8 \(5, 3, 8, 8\)"),
    (np.zeros((0, 8, 8, 3), np.uint8), np.arange(0), r"images\.npy is uint8 \(0, 8, 8, 3\)"),
    (np.array([None]), np.arange(1), r"images\.npy is no readable array"),
    (None, np.arange(5), "holds neither images.npy nor train_images.npy"),
    (FIVE, None, r"labels\.npy, the labels of images\.npy, is missing"),
    (FIVE, np.arange(4), "has 4 labels for 5 images"), (FIVE, np.arange(5) / 2, r"labels\.npy is float64"),
    (FIVE, np.ones((5, 2)), r"labels\.npy is float64 \(5, 2\)"), (FIVE, np.arange(5) - 1, "has the label -1"),
])  # fmt: skip
def test_npy_that_cannot_be_used_is_named(tmp_path, images, labels, message):
    arrays = {"images": images, "labels": labels}
    write_arrays(tmp_path, **{name: array for name, array in arrays.items() if array is not None})
    assert_read_fails(message, "npy", tmp_path, labels=10)
