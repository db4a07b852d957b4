import gzip
import struct

import numpy as np
import pytest

from frostline.files import DataError, locate
from frostline.idx import image_dims, read_images, read_labels

PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
IMAGES = struct.pack(">4I", 0x803, 2, 3, 4) + PIXELS.tobytes()
LABELS = struct.pack(">2I", 0x801, 3) + bytes([7, 0, 255])


def place(folder, name: str, content: bytes):
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return locate(f"{folder}/{name}")


@pytest.mark.parametrize("name", ["plain", "packed.gz"])
def test_images_and_labels(tmp_path, name):
    images = place(tmp_path, f"i-{name}", IMAGES)
    assert image_dims(images) == (2, 3, 4)
    np.testing.assert_array_equal(read_images(images), PIXELS)
    assert read_labels(place(tmp_path, f"l-{name}", LABELS)).tolist() == [7, 0, 255]


@pytest.mark.parametrize("name", ["plain", "packed.gz"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged or cut short"),
        (IMAGES[:9], "damaged or cut short"),
        (LABELS + bytes(8), "no IDX file of images: it opens with 0x00000801, not 0x00000803"),
        (IMAGES[:-1], "its header announces 24 bytes of content, it has 23"),
        (IMAGES + b"x", "its header announces 24 bytes of content, it has more"),
        (struct.pack(">4I", 0x803, 2, 0, 4), "its header announces images of 0 x 4 pixels"),
        (struct.pack(">4I", 0x803, 2, 1 << 31, 4), "its header announces images of 2147483648 x 4 pixels"),
    ],
)
def test_damaged_images_are_named(tmp_path, name, content, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read_images(place(tmp_path, name, content))
    assert f"{tmp_path}/{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LABELS[:-1], "announces 3 bytes of content, it has 2"),
        (LABELS + b"x", "it has more"),
        (IMAGES, "no IDX file of labels"),
        (LABELS[:5], "damaged or cut short"),
    ],
)
def test_damaged_labels_are_named(tmp_path, content, reason):
    with pytest.raises(DataError, match=reason):
        read_labels(place(tmp_path, "labels", content))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_gzip_cut_short_or_flipped_is_damage(tmp_path, keep):
    packed = gzip.compress(IMAGES * 50)
    (tmp_path / "x.gz").write_bytes(packed[: int(keep * len(packed))])
    with pytest.raises(DataError, match=r"x\.gz"):
        read_images(locate(f"{tmp_path}/x.gz"))
    (tmp_path / "x.gz").write_bytes(b"not gzip, whatever its name says")
    with pytest.raises(DataError, match=r"cannot read .*x\.gz: Not a gzipped file"):
        read_images(locate(f"{tmp_path}/x.gz"))
