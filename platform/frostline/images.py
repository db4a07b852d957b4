"""From the bytes of one image to square uint8 RGB pixels: the only place where images are decoded."""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from frostline.samples import BadSample

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
DECODE_VERSION = 1  # part of every cache key: raise it whenever the same bytes may come to give other pixels

Fit = Literal["crop", "squash"]

_UPRIGHT = {  # EXIF orientation -> what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_ANY_PARSER_ERROR = (  # what Pillow's parsers let out when bytes are broken or hostile
    *(OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError),
    *(EOFError, OverflowError, ZeroDivisionError, RuntimeError, MemoryError, struct.error, zlib.error),
)
_HUSH = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class BadImage(BadSample):
    """One image cannot be used."""


def decode(raw: bytes, *, size: int, fit: Fit, max_pixels: int) -> np.ndarray:
    """An encoded image as (size, size, 3) uint8 RGB: upright by its EXIF orientation, transparency over white, 16-bit
    grey scaled to 8, resized bicubic with antialiasing. Of an animation the first frame.

    Raises BadImage when the bytes are empty, broken, of a format that is not in `FORMATS`, or when their header
    announces more than `max_pixels` pixels; those are refused before anything is decoded.
    """
    if not raw:
        raise BadImage("empty: no bytes")
    _hush_pillow()
    try:
        image = Image.open(BytesIO(raw), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage(f"not an image: none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from None
    except _ANY_PARSER_ERROR as error:
        raise BadImage(f"corrupt: {_brief(error)}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"too large: {width} x {height} pixels, allowed are {max_pixels:,} in all")
    return fitted(image, size=size, fit=fit)


def decode_grey(raw: bytes, shape: tuple[int, int], *, size: int, fit: Fit) -> np.ndarray:
    """Unencoded grey pixels, one byte each, `shape` = (height, width), as (size, size, 3) uint8; resized as in `decode`."""
    grey = np.frombuffer(raw, np.uint8).reshape(shape)
    return _squared(Image.fromarray(grey).convert("RGB"), size, fit)


def fitted(image: Image.Image, *, size: int, fit: Fit) -> np.ndarray:
    """An opened image as `decode` gives it, (size, size, 3) uint8. Raises BadImage where its pixels cannot be had."""
    try:
        image.load()
        return _squared(_rgb(_upright(image)), size, fit)
    except BadImage:
        raise
    except (Image.DecompressionBombError, *_ANY_PARSER_ERROR) as error:
        raise BadImage(f"corrupt: {_brief(error)}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except _ANY_PARSER_ERROR:  # broken metadata around sound pixels is common, and then nothing says how to turn them
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")  # 65535 = 257 * 255, rounded
    if image.mode in ("I", "F"):
        raise BadImage(f"pixel type: 32-bit {'integers' if image.mode == 'I' else 'floats'} have no agreed range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _squared(image: Image.Image, size: int, fit: Fit) -> np.ndarray:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if fit == "crop" else (0, 0, width, height)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _hush_pillow() -> None:
    """Pillow warns of odd metadata and large images. `warnings.catch_warnings` is not safe in threads, so one filter
    for Pillow's own modules is kept in front instead (which also holds when warnings are errors)."""
    if warnings.filters[:1] != [_HUSH]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 100 else text[:99] + "…"
