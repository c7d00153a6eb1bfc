"""From what a set of images holds to the PNG of a shard: decoded, converted, cropped, or refused by name."""

import io
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from pipeline.config import DataConfig
from pipeline.errors import PipelineError
from pipeline.store.tars import Record, encode_png

MODES = {1: "L", 3: "RGB"}


class Picture(NamedTuple):
    """An image as its set holds it: encoded bytes, or uint8 (H,W,C). `name` is what an error calls it."""

    name: str
    image: bytes | np.ndarray
    label: int | None


class Undecodable(Exception):
    """The bytes are no whole image."""


@cache
def readable() -> dict[str, str]:
    """Extension -> format of all that Pillow reads by itself (PostScript would start Ghostscript)."""
    extensions = Image.registered_extensions()
    return {extension: name for extension, name in extensions.items() if name in Image.OPEN and name != "EPS"}


@cache
def _formats() -> tuple[str, ...]:
    """The commonest first: Pillow tries them in this order."""
    return tuple(dict.fromkeys(("PNG", "JPEG", *readable().values())))


def to_record(key: str, picture: Picture, data: DataConfig) -> Record:
    """The picture as `data` wants it. Raises Undecodable, or PipelineError where it does not fit `data`."""
    return Record(key, _to_png(picture, data), _label(picture, data))


def _label(picture: Picture, data: DataConfig) -> int | None:
    if not data.labels:
        return None
    if picture.label is None:
        raise PipelineError(f"{picture.name} has no label, but data.labels={data.labels}; set data.labels=0")
    if not isinstance(picture.label, int | np.integer):
        raise PipelineError(
            f"{picture.name} has the label {picture.label!r}, no class number; set data.labels=0"
        )
    if not 0 <= picture.label < data.labels:
        raise PipelineError(
            f"{picture.name} has the label {picture.label}, but data.labels={data.labels} allows "
            f"0 to {data.labels - 1}; set data.labels to the number of classes"
        )
    return int(picture.label)


def _to_png(picture: Picture, data: DataConfig) -> bytes:
    size = (data.image_size, data.image_size)
    if isinstance(picture.image, np.ndarray):
        image = _from_array(picture.image, picture.name, data)
    else:
        image = _open(picture.image)
        as_it_is = image.format == "PNG" and image.mode == MODES[data.channels] and image.size == size
        if as_it_is and not image.info.get("exif"):
            return picture.image
        image = _convert(ImageOps.exif_transpose(image), data.channels)
    if image.size != size:
        image = _resize(image, picture.name, data)
    return encode_png(np.asarray(image))


def _from_array(pixels: np.ndarray, name: str, data: DataConfig) -> Image.Image:
    channels = pixels.shape[2]
    if channels != data.channels:
        raise PipelineError(
            f"{name} has {channels} channel(s), but data.channels={data.channels}; "
            f"set data.channels={channels}"
        )
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def _open(encoded: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded), formats=_formats())
        if image.format == "PNG":  # decoding does not compare the checksums of PNG's chunks, verify() does
            image.verify()
            image = Image.open(io.BytesIO(encoded), formats=("PNG",))
        image.load()
    except Exception as error:  # Pillow's plugins raise nearly anything on broken input
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise Undecodable(reason or type(error).__name__) from error
    return image


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Undecodable(f"mode {image.mode} has no defined range of grey; save it with 8 bits")
    return image.convert(MODES[channels])


def _resize(image: Image.Image, name: str, data: DataConfig) -> Image.Image:
    if data.resize == "refuse":
        raise PipelineError(
            f"{name} has {image.width}x{image.height} pixels, but data.image_size={data.image_size}; "
            "set data.resize=crop to crop and resize"
        )
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: resize(box=...) would let the filter reach beyond the square.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((data.image_size, data.image_size), Image.Resampling.LANCZOS)
