"""Sets of images in the form of each source."""

import io
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.store import tars


def encode(image: np.ndarray, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def draw_numbered(count: int, start: int = 0) -> np.ndarray:
    """Images, the i-th of which has the grey level 6 i."""
    return np.arange(start, start + count, dtype=np.uint8).repeat(8 * 8 * 3).reshape(-1, 8, 8, 3) * 6


def encode_numbered(count: int, start: int = 0) -> list[bytes]:
    return list(map(encode, draw_numbered(count, start)))


def save(path: Path, image: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def write_parquet(path: Path, images: list, labels: list[int] | None, **more) -> Path:
    """Encoded images as on the hub, in four rows a group; `more` are further columns."""
    import pyarrow
    import pyarrow.parquet as parquet

    column = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    columns = {"img": column} | ({} if labels is None else {"label": labels}) | more
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=4)
    return path


def write_lmdb(folder: Path, images: list[bytes]) -> Path:
    import lmdb

    folder.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(folder), map_size=1 << 26, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for i, image in enumerate(images):
            transaction.put(b"%040x" % (i * 977), image)
    return folder


def write_arrays(root: Path, **arrays) -> Path:
    root.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array)
    return root


def write_shards(folder: Path, images, counts, classes=7, splits=("train",), others=(), **facts) -> Path:
    """Shards of so many images each, the same ones in each split, sealed with other files of the folder."""
    shards: dict[str, list] = {split: [] for split in splits}
    for split in splits:
        for number, (start, stop) in enumerate(pairwise(accumulate(counts, initial=0))):
            shard = tars.Shard(folder, f"{split}-{number:05d}.tar", split, start, stop)
            label = {i: i % classes if classes else None for i in range(start, stop)}
            shard.write(tars.Record(f"{split}-{i:08d}", tars.encode_png(images[i]), label[i]) for i in label)
            shards[split].append(shard.require_facts())
    facts |= {"image_size": images.shape[1], "channels": images.shape[3]}
    tars.write_shard_manifest(folder, shards, others, **facts)
    return folder


def write_set(source: str, root: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Images, uint8 (N,H,W) or (N,H,W,C), with labels up to 2 as folders; in LMDB without any."""
    if source == "npy":
        return write_arrays(root, images=images, labels=labels)
    if source == "lmdb":
        return write_lmdb(root, [encode(image, "webp", lossless=True) for image in images])
    if source != "folder":
        return write_parquet(root / "set.parquet", list(map(encode, images)), labels.tolist()).parent
    for i, image in enumerate(images):
        save(root / ("ant", "bee", "cat")[labels[i]] / f"{i}.png", image)
    return root
