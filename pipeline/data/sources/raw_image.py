"""Converts an image of a source to a record of a shard."""

import io
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from pipeline.config import DataConfig
from pipeline.errors import PipelineError
from pipeline.store.tars import Record, encode_png

MODES = {1: "L", 3: "RGB"}


class RawImage(NamedTuple):
    """An image of a source: encoded bytes, or uint8 (H,W,C); `name` is used in messages."""

    name: str
    image: bytes | np.ndarray
    label: int | None


class DecodeError(Exception):
    """The bytes are not a complete image."""


@cache
def list_image_extensions() -> dict[str, str]:
    """Return the format of each file extension that Pillow reads without Ghostscript."""
    extensions = Image.registered_extensions()
    return {extension: name for extension, name in extensions.items() if name in Image.OPEN and name != "EPS"}


def convert_to_record(key: str, raw: RawImage, data: DataConfig) -> Record:
    """Convert an image to a record of the size, channels and label that `data` sets.

    Raises DecodeError, or PipelineError where the image does not fit.
    """
    png, label, classes = _convert_to_png(raw, data), raw.label, data.labels
    if not classes:
        return Record(key, png, None)
    if not isinstance(label, int | np.integer):
        found = "no label" if label is None else f"the label {label!r}, no class number"
        raise PipelineError(f"{raw.name} has {found}, but data.labels={classes}; set data.labels=0")
    if not 0 <= label < classes:
        allowed = f"data.labels={classes} allows 0 to {classes - 1}; set data.labels to the number of classes"
        raise PipelineError(f"{raw.name} has the label {label}, but {allowed}")
    return Record(key, png, int(label))


def _convert_to_png(raw: RawImage, data: DataConfig) -> bytes:
    size, mode = (data.image_size, data.image_size), MODES[data.channels]
    if isinstance(raw.image, bytes):
        image = _decode(raw.image)
        fits = image.format == "PNG" and image.mode == mode and image.size == size
        if fits and not image.info.get("exif"):
            return raw.image
        image = _convert_mode(ImageOps.exif_transpose(image), mode)
    else:
        channels = raw.image.shape[2]
        if channels != data.channels:
            remedy = f"set data.channels={channels}"
            raise PipelineError(
                f"{raw.name} has {channels} channel(s), but data.channels={data.channels}; {remedy}"
            )
        image = Image.fromarray(raw.image[:, :, 0] if channels == 1 else raw.image)
    if image.size != size:
        if data.resize == "refuse":
            found = (
                f"{raw.name} has {image.width}x{image.height} pixels, but data.image_size={data.image_size}"
            )
            raise PipelineError(f"{found}; set data.resize=crop to crop and resize")
        # Cropped first: resize(box=...) would let the filter reach beyond the square.
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize(size, Image.Resampling.LANCZOS)
    return encode_png(np.asarray(image))


def _decode(encoded: bytes) -> Image.Image:
    formats = tuple(dict.fromkeys(("PNG", "JPEG", *list_image_extensions().values())))  # tried in this order
    try:
        image = Image.open(io.BytesIO(encoded), formats=formats)
        if image.format == "PNG":  # decoding does not compare the checksums of PNG's chunks, verify() does
            image.verify()
            image = Image.open(io.BytesIO(encoded), formats=("PNG",))
        image.load()
    except Exception as error:  # Pillow's plugins raise nearly anything on broken input
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DecodeError(reason or type(error).__name__) from error
    return image


def _convert_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DecodeError(f"mode {image.mode} has no defined range of grey; save it with 8 bits")
    return image.convert(mode)
