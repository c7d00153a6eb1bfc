"""Conversion of a source's images to the records of shards."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.ImageFile import StubImageFile

from pipeline.config import DataConfig
from pipeline.errors import PipelineError
from pipeline.store.tars import Record, encode_png

MODES = {1: "L", 3: "RGB"}
# Nothing else has the extensions of these formats.
COMMON = {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"}


class RawImage(NamedTuple):
    """An image of a source: encoded bytes, or uint8 (H,W,C); `name` is used in messages."""

    name: str
    image: bytes | np.ndarray
    label: int | None


class DecodeError(Exception):
    """The bytes are not a complete image."""


@cache
def list_image_extensions() -> dict[str, str]:
    """Return the format of each file extension that Pillow can decode, without plugins, as a still picture."""
    stubs = {
        name
        for name, (kind, _) in Image.OPEN.items()
        if isinstance(kind, type) and issubclass(kind, StubImageFile)
    }
    known, without = Image.registered_extensions(), {"EPS", "MPEG", *stubs}
    return {end: name for end, name in known.items() if name in Image.OPEN and name not in without}


def is_image_file(file: Path) -> bool:
    """Return whether a file is an image: by its extension, and by its first bytes if other files have it too."""
    name = list_image_extensions().get(file.suffix.lower())
    if name is None or name in COMMON:
        return name is not None
    with suppress(DecodeError), _translate_pillow_errors(), Image.open(file, formats=(name,)):
        return True
    return False


@contextmanager
def _translate_pillow_errors() -> Iterator[None]:
    """Raise any error of Pillow, and its warning of too many pixels, as DecodeError; suppress its other warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (PipelineError, DecodeError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DecodeError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on broken input
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DecodeError(reason or type(error).__name__) from error


def convert_to_record(key: str, raw: RawImage, data: DataConfig) -> Record:
    """Convert an image to a record of the size, channels and label that `data` sets.

    Raises DecodeError, or PipelineError if the image does not fit.
    """
    label, classes = raw.label, data.labels
    with _translate_pillow_errors():
        png = _convert_to_png(raw, data)
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
        colours, alpha = _split_alpha(image)
        fits = image.format == "PNG" and image.mode == mode and image.size == size
        if fits and alpha is None and not image.info.get("exif"):
            return raw.image
        if alpha is not None:
            if data.background is None:
                remedy = "set data.background=white or black to lay it on that colour"
                raise PipelineError(f"{raw.name} is transparent in part; {remedy}")
            background = Image.new("RGB", image.size, data.background)
            image = Image.composite(_convert_mode(colours, "RGB"), background, alpha)
        image = _convert_mode(image, mode)
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
            found = f"{raw.name} has {image.width}x{image.height} pixels"
            remedy = "crop and resize it, or set data.resize=crop"
            raise PipelineError(f"{found}, but data.image_size={data.image_size}; {remedy}")
        # Cropped first: resize(box=...) would let the filter reach beyond the square.
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize(size, Image.Resampling.LANCZOS)
    return encode_png(np.asarray(image))


def _decode(encoded: bytes) -> Image.Image:
    """Decode an image and turn it upright by its orientation tag; a turned image has no `format`."""
    formats = tuple(dict.fromkeys(("PNG", "JPEG", *list_image_extensions().values())))  # tried in this order
    image = Image.open(io.BytesIO(encoded), formats=formats)
    if image.format == "PNG":  # decoding does not compare the checksums of PNG's chunks, verify() does
        image.verify()
        image = Image.open(io.BytesIO(encoded), formats=("PNG",))
    image.load()
    is_turned = False
    with suppress(Exception):  # a broken orientation tag is ignored
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    return ImageOps.exif_transpose(image) if is_turned else image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours, and the opacity of each pixel (mode L) in any form of the file; None if all is opaque."""
    if not image.has_transparency_data:
        return image, None
    colours, key = image, image.info.get("transparency")
    if image.mode.startswith("I;16"):
        alpha = Image.fromarray((np.asarray(image) != key).astype(np.uint8) * np.uint8(255))
    else:
        # Of a colour of 16 bits Pillow keeps the upper 8.
        if isinstance(key, tuple) and max(key) > 255:
            image.info["transparency"] = tuple(level >> 8 for level in key)
        colours = image.convert("LA" if image.mode == "La" else "RGBA")
        alpha = colours.getchannel("A")
    return colours, alpha if alpha.getextrema()[0] != 255 else None


def _convert_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DecodeError(f"mode {image.mode} has no defined range of grey; save it with 8 bits")
    return image.convert(mode)
