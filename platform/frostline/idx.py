"""The IDX format of MNIST and its kin, plain or gzipped: http://yann.lecun.com/exdb/mnist."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from frostline.files import DataError, Place, reaching

_IMAGES = 0x00000803  # unsigned bytes, 3 dimensions
_LABELS = 0x00000801  # unsigned bytes, 1 dimension
_LARGEST_SIDE = 65536
_PIECE = 1 << 24


def image_dims(place: Place) -> tuple[int, int, int]:
    """(count, height, width), from the header of a file of images. Raises DataError when it is not one."""
    with _opened(place) as stream:
        return _image_header(stream, place)


def read_images(place: Place) -> np.ndarray:
    """(count, height, width) uint8. Raises DataError when the file is damaged."""
    with _opened(place) as stream:
        dims = _image_header(stream, place)
        return np.frombuffer(_body(stream, dims[0] * dims[1] * dims[2], place), np.uint8).reshape(dims)


def read_labels(place: Place) -> np.ndarray:
    """(count,) uint8. Raises DataError when the file is damaged or not one of labels."""
    with _opened(place) as stream:
        magic, count = struct.unpack(">2I", stream.read(8))
        if magic != _LABELS:
            raise DataError(f"{place.name} is no IDX file of labels: it opens with {magic:#010x}, not {_LABELS:#010x}")
        return np.frombuffer(_body(stream, count, place), np.uint8)


def _image_header(stream: Any, place: Place) -> tuple[int, int, int]:
    magic, count, height, width = struct.unpack(">4I", stream.read(16))
    if magic != _IMAGES:
        raise DataError(f"{place.name} is no IDX file of images: it opens with {magic:#010x}, not {_IMAGES:#010x}")
    if not (0 < height <= _LARGEST_SIDE and 0 < width <= _LARGEST_SIDE):
        raise DataError(f"{place.name} is damaged: its header announces images of {height} x {width} pixels")
    return count, height, width


def _body(stream: Any, size: int, place: Place) -> bytes:
    body = bytearray()
    while piece := stream.read(min(size - len(body), _PIECE)):  # a header may announce more than any memory holds
        body += piece
    if len(body) != size or stream.read(1):
        has = "more" if len(body) == size else str(len(body))
        raise DataError(f"{place.name} is damaged: its header announces {size} bytes of content, it has {has}")
    return bytes(body)


@contextmanager
def _opened(place: Place) -> Iterator[Any]:
    try:
        with reaching(place), place.fs.open_input_stream(place.path, compression=None) as stream:
            if not place.path.endswith(".gz"):
                yield stream
            else:
                with gzip.GzipFile(fileobj=stream) as unpacked:  # pyright: ignore[reportArgumentType]
                    yield unpacked
    except (EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{place.name} is damaged or cut short: {error}") from error
