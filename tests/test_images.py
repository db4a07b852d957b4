import subprocess
import sys
import time
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from frostline.images import FORMATS, BadImage, decode, decode_grey

MANY = 1_000_000


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def picture(width: int = 24, height: int = 24) -> Image.Image:
    """Smooth, without any symmetry, so that every turn of it differs and lossy formats stay near."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * y) % 97], axis=-1).astype(np.uint8))


def decoded(raw: bytes, size: int = 24, fit: str = "crop", max_pixels: int = MANY) -> np.ndarray:
    return decode(raw, size=size, fit=fit, max_pixels=max_pixels)  # pyright: ignore[reportArgumentType]


def bomb() -> bytes:
    """A PNG of 9000 x 9000 grey zeros in less than 10 kB: its rows are compressed twice over by their sameness."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    side = 9000
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # 1 bit grey
    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_rgb_of_its_pixels(form):
    lossy = form in ("JPEG", "GIF")
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    pixels = decoded(encoded(picture(), form, **options))
    assert (pixels.shape, pixels.dtype) == ((24, 24, 3), np.uint8)
    error = np.abs(pixels.astype(int) - np.asarray(picture()).astype(int))
    assert error.mean() < 16 if lossy else error.max() == 0


def test_formats_off_the_list_are_refused():
    with pytest.raises(BadImage, match="not an image: none of PNG, JPEG, WEBP, BMP, GIF, TIFF"):
        decoded(encoded(picture(), "PPM"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation, form):
    stored_as = {  # how an upright image must be stored for a viewer to turn it back
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    upright = picture(32, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(upright if stored_as is None else upright.transpose(stored_as), form, exif=exif)
    np.testing.assert_array_equal(decoded(raw, fit="squash"), decoded(encoded(upright), fit="squash"))


def test_broken_exif_around_sound_pixels_is_not_held_against_them():
    raw = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\xff\xff")
    np.testing.assert_array_equal(decoded(raw), decoded(encoded(picture(), "JPEG")))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 128, 129, 257, 32768, 40000, 65406, 65535]], np.uint16).repeat(8, axis=0)
    for form in ("PNG", "TIFF"):
        row = decoded(encoded(Image.fromarray(levels), form), 8)[0]
        assert row[:, 0].tolist() == [0, 0, 1, 1, 128, 156, 254, 255]  # round(level * 255 / 65535)
        assert (row[:, 0] == row[:, 1]).all()
        assert (row[:, 0] == row[:, 2]).all()


def test_pixel_types_without_a_range_are_refused():
    with pytest.raises(BadImage, match="pixel type: 32-bit floats have no agreed range"):
        decoded(encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"))
    with pytest.raises(BadImage, match="pixel type: 32-bit integers"):
        decoded(encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"))


def test_transparency_is_composited_on_white():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = [255, 0, 0, 255]
    rgba[:, 4:6] = [0, 0, 255, 51]  # a fifth of blue
    pixels = decoded(encoded(Image.fromarray(rgba)), 8)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 4].tolist() == [204, 204, 255]
    assert pixels[0, 7].tolist() == [255, 255, 255]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_transparency_is_composited_on_white(transparency):
    image = Image.new("P", (8, 8))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (4, 0, 8, 8))
    pixels = decoded(encoded(image, transparency=transparency), 8)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 7].tolist() == [200, 100, 50]


@pytest.mark.parametrize(("mode", "form"), [("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("CMYK", "TIFF")])
def test_other_modes_become_rgb(mode, form):
    flat = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    assert (decoded(encoded(flat, form), 8) == 255).all()


def test_cmyk_jpeg_keeps_its_colours():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    assert np.abs(decoded(encoded(cmyk, "JPEG"), 8)[4, 4].astype(int) - [255, 0, 0]).max() <= 3


def test_an_animation_gives_its_first_frame():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    raw = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert decoded(raw, 8)[0, 0].tolist() == [255, 0, 0]


def test_crop_keeps_the_centre_and_squash_keeps_all():
    bands = np.zeros((10, 30, 3), np.uint8)
    bands[:, :10, 0] = bands[:, 10:20, 1] = bands[:, 20:, 2] = 255
    raw = encoded(Image.fromarray(bands))
    assert (decoded(raw, 10) == [0, 255, 0]).all()
    squashed = decoded(raw, 12, "squash")
    assert squashed[6, [1, 6, 10]].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_shrinking_is_antialiased():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(decoded(encoded(Image.fromarray(board)), 8).astype(int) - 127).max() <= 2


def test_grey_bytes_are_resized_as_images_are():
    grey = np.asarray(picture(28, 20).convert("L"))
    for size, fit in ((8, "crop"), (40, "squash")):
        ours = decode_grey(grey.tobytes(), (20, 28), size=size, fit=fit)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(ours, decoded(encoded(Image.fromarray(grey)), size, fit))


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty: no bytes"),
        (b"<html>no image</html>", "not an image"),
        (encoded(picture(64, 64))[:1500], "corrupt: "),
        (encoded(picture(64, 64), "JPEG")[:700], "corrupt: image file is truncated"),
        (encoded(picture())[:20], "corrupt: Truncated File Read"),
    ],
)
def test_what_is_no_whole_image_is_refused_with_a_short_reason(raw, reason):
    with pytest.raises(BadImage) as caught:
        decoded(raw)
    assert str(caught.value).startswith(reason)
    assert len(str(caught.value)) < 120
    assert "0x" not in str(caught.value)  # no object addresses: reasons are compared and stored


@pytest.mark.fault(39)
def test_a_bomb_is_refused_from_its_header():
    raw = bomb()
    assert len(raw) < 10_300
    assert Image.open(BytesIO(raw)).size == (9000, 9000)
    started = time.process_time()
    with pytest.raises(BadImage, match="too large: 9000 x 9000 pixels, allowed are 50,000,000 in all"):
        decoded(raw, max_pixels=50_000_000)
    refused_s = time.process_time() - started
    assert decoded(raw, 8, max_pixels=81_000_000).tolist() == np.zeros((8, 8, 3)).tolist()
    assert refused_s < (time.process_time() - started) / 5  # nothing was decoded


@pytest.mark.fault(39)
def test_the_pixel_limit_is_exact():
    raw = encoded(picture(20, 10))
    assert decoded(raw, 8, max_pixels=200).shape == (8, 8, 3)
    with pytest.raises(BadImage, match="20 x 10 pixels, allowed are 199"):
        decoded(raw, 8, max_pixels=199)


def test_pillows_own_limit_is_a_reason_too():
    raw = bytearray(encoded(picture()))
    raw[16:24] = (20_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    with pytest.raises(BadImage, match="too large: "):
        decoded(bytes(raw), max_pixels=10**9)


def test_pillow_warns_nobody():
    """In a process of its own, which shows all warnings: corrupt metadata, and an image above Pillow's warning level."""
    code = """
import sys
from io import BytesIO
from PIL import Image
from frostline.images import decode
out = BytesIO()
Image.new("L", (10_000, 9_000)).save(out, "PNG")
decode(out.getvalue(), size=8, fit="crop", max_pixels=90_000_000)
out = BytesIO()
Image.new("RGB", (8, 8)).save(out, "JPEG", exif=b"Exif\\0\\0II*\\0\\x08\\0\\0\\0\\x05\\0\\x12\\x01\\xff\\xff")
decode(out.getvalue(), size=8, fit="crop", max_pixels=64)
"""
    for option in ("always", "error"):
        ran = subprocess.run([sys.executable, "-W", option, "-c", code], capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (0, "")


def test_other_modules_still_warn():
    decoded(encoded(picture()))
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)


SEEDS = [encoded(picture(), form) for form in FORMATS] + [encoded(picture(), "TIFF", compression="tiff_lzw")]


@pytest.mark.fault(38)
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), st.floats(0, 1))
def test_any_bytes_give_pixels_or_a_bad_image(raw, changes, keep):
    hurt = bytearray(raw)
    for where, byte in changes:
        hurt[int(where * (len(hurt) - 1))] = byte
    if keep < 0.3:
        del hurt[int(keep / 0.3 * len(hurt)) :]
    try:
        pixels = decoded(bytes(hurt), 8)
    except BadImage:
        return
    assert pixels.shape == (8, 8, 3)
