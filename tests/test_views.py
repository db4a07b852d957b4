import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torchvision.transforms.v2 import functional

from frostline.spec import Augment
from frostline.views import VIEWS_VERSION, augmented, drawn, view_of, views_key

SIZE = 24
ALL = Augment(views="live", flip=True, crop=0.3, colour=0.5)
NOTHING = Augment(views="live", flip=False, crop=1.0, colour=0.0)
PINNED = "dc99fbecce4606e0"

HASH_IN_PROCESS = """
import hashlib, sys
import numpy as np, torch
from frostline.spec import Augment
from frostline.views import augmented
torch.set_num_threads(int(sys.argv[1]))
pixels = np.load(sys.argv[2], mmap_mode="r")
views = augmented(pixels, np.arange(len(pixels)), 3, Augment.model_validate_json(sys.argv[3]), 7)
print(hashlib.sha256(views.tobytes()).hexdigest())
"""


def pictures(count: int = 12, size: int = SIZE) -> np.ndarray:
    """(count, size, size, 3) uint8: gradients with a texture, all different, without any symmetry. Whole numbers only."""
    n, y, x = np.mgrid[0:count, 0:size, 0:size]
    planes = (x * 255 // size, y * 255 // size, (x * y + 31 * n) % 97)
    return ((np.stack(planes, axis=-1) + 13 * n[..., None]) % 256).astype(np.uint8)


def sha256(views: np.ndarray) -> str:
    return hashlib.sha256(views.tobytes()).hexdigest()


def test_epochs_show_the_views_in_turn():
    assert [view_of(epoch, Augment(views=0)) for epoch in (1, 2)] == [None, None]
    assert [view_of(epoch, Augment(views=3)) for epoch in range(1, 8)] == [0, 1, 2, 0, 1, 2, 0]
    assert [view_of(epoch, Augment(views="live")) for epoch in (1, 2, 5000)] == [0, 1, 4999]


@pytest.mark.parametrize("size", [1, 8, 24, 65])
def test_a_view_has_the_shape_and_type_of_its_image_and_leaves_it_alone(size):
    pixels = pictures(6, size)
    before = pixels.copy()
    views = augmented(pixels, np.arange(6), 0, ALL, 7)
    assert (views.shape, views.dtype) == (pixels.shape, np.uint8)
    assert not np.shares_memory(views, pixels)
    assert np.array_equal(pixels, before)


def test_no_images_give_no_views():
    assert augmented(pictures(0), np.arange(0), 0, ALL, 7).shape == (0, SIZE, SIZE, 3)


def test_one_view_of_one_image_is_pinned():
    """A change of this hash is a change of the algorithm: raise VIEWS_VERSION with it."""
    assert VIEWS_VERSION == 1
    assert sha256(augmented(pictures(8), np.arange(100, 108), 3, ALL, 7))[:16] == PINNED


BATCH = pictures()
NUMBERS = 1000 + 7 * np.arange(len(BATCH))
WHOLE = augmented(BATCH, NUMBERS, 5, ALL, 7)


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(st.integers(0, len(BATCH) - 1), min_size=1, max_size=20),
    cuts=st.lists(st.integers(1, 19), max_size=3),
    noise=st.integers(0, 2**31),
)
def test_a_view_is_the_same_in_every_batch_order_and_chunking_and_under_every_global_seed(chosen, cuts, noise):
    torch.manual_seed(noise)
    np.random.seed(noise)
    parts = np.split(np.array(chosen), sorted(cuts))
    views = np.concatenate([augmented(BATCH[part], NUMBERS[part], 5, ALL, 7) for part in parts])
    assert np.array_equal(views, WHOLE[chosen])


def test_no_global_generator_is_drawn_from():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    augmented(BATCH, NUMBERS, 0, ALL, 7)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_a_view_is_the_same_in_other_processes_with_other_threads_and_on_other_processors(tmp_path):
    pixels = pictures(3, 300)  # large enough for torch to split the work over threads
    np.save(tmp_path / "pixels.npy", pixels)
    here = sha256(augmented(pixels, np.arange(3), 3, ALL, 7))
    for threads, environment in (("1", {}), ("4", {}), ("1", {"ATEN_CPU_CAPABILITY": "default"})):
        command = [sys.executable, "-c", HASH_IN_PROCESS, threads, tmp_path / "pixels.npy", ALL.model_dump_json()]
        there = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        assert there.stdout.strip() == here, (threads, environment)


def test_memory_maps_and_strided_arrays_give_the_same_views(tmp_path):
    np.save(tmp_path / "pixels.npy", BATCH)
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    planar = np.ascontiguousarray(BATCH.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    backwards = np.ascontiguousarray(BATCH[::-1])[::-1]
    for augment in (ALL, Augment(views="live"), NOTHING):
        expected = augmented(BATCH, NUMBERS, 5, augment, 7)
        for pixels in (mapped, planar, backwards):
            assert np.array_equal(augmented(pixels, NUMBERS, 5, augment, 7), expected)


def test_samples_views_and_seeds_differ():
    same = np.repeat(BATCH[:1], 40, axis=0)
    numbers = np.arange(40)
    by_sample = augmented(same, numbers, 0, ALL, 7)
    by_view = np.concatenate([augmented(BATCH[:1], numbers[:1], view, ALL, 7) for view in range(1, 41)])
    by_seed = np.concatenate([augmented(BATCH[:1], numbers[:1], 0, ALL, seed) for seed in range(100, 140)])
    seen = {sha256(view) for views in (by_sample, by_view, by_seed) for view in views}
    assert len(seen) == 120


def test_nothing_switched_on_shows_the_images_as_they_are():
    assert np.array_equal(augmented(BATCH, NUMBERS, 5, NOTHING, 7), BATCH)


def test_a_flip_alone_mirrors_about_half_of_the_images():
    augment = Augment(views="live", crop=1.0)
    views = np.concatenate([augmented(BATCH, NUMBERS, view, augment, 7) for view in range(50)])
    images = np.concatenate([BATCH] * 50)
    mirrored = (views == images[:, :, ::-1]).all(axis=(1, 2, 3))
    untouched = (views == images).all(axis=(1, 2, 3))
    assert (mirrored ^ untouched).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(images))


@pytest.mark.parametrize("size", [8, 64, 224])
@pytest.mark.parametrize("crop", [0.01, 0.3, 0.9, 1.0])
def test_crops_keep_the_share_and_the_shape_that_are_asked_for(crop, size):
    views = [drawn(sample, 2, Augment(views="live", crop=crop), 7, size) for sample in range(2000)]
    heights, widths = np.array([[view.height, view.width] for view in views]).T
    tops, lefts = np.array([[view.top, view.left] for view in views]).T
    assert (tops >= 0).all()
    assert (tops + heights <= size).all()
    assert (lefts >= 0).all()
    assert (lefts + widths <= size).all()
    shares = heights * widths / size**2
    assert shares.min() >= crop * (1 - 1e-12)
    assert (widths <= heights * 4 / 3 + 1).all()
    assert (heights <= widths * 4 / 3 + 1).all()
    if size == 224:  # sides rounded up add at most about 1 % of the area
        assert shares.mean() == pytest.approx((1 + crop) / 2, abs=0.02)
        assert np.log(widths / heights).mean() == pytest.approx(0, abs=0.02)
        assert (2 * tops - (size - heights)).mean() == pytest.approx(0, abs=0.03 * size)
        assert (2 * lefts - (size - widths)).mean() == pytest.approx(0, abs=0.03 * size)


def test_crops_reach_every_corner():
    views = [drawn(sample, 0, Augment(views="live", crop=0.3), 7, 8) for sample in range(2000)]
    cropped = [view for view in views if max(view.height, view.width) < 8]
    for top, left in ((True, True), (True, False), (False, True), (False, False)):
        assert any(
            (view.top == 0 if top else view.top + view.height == 8)
            and (view.left == 0 if left else view.left + view.width == 8)
            for view in cropped
        )


def test_factors_fill_their_interval():
    views = [drawn(sample, 0, ALL, 7, SIZE) for sample in range(2000)]
    factors = np.array([(view.brightness, view.contrast, view.saturation) for view in views])
    assert factors.min() >= 0.5
    assert factors.max() <= 1.5
    assert factors.mean(axis=0) == pytest.approx(1, abs=0.03)
    assert factors.std(axis=0) == pytest.approx(1 / np.sqrt(12), abs=0.02)
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.1  # four standard errors


def test_switching_one_part_off_leaves_the_others_as_they_were():
    whole = drawn(5, 2, ALL, 7, 64)
    grey = drawn(5, 2, ALL.model_copy(update={"colour": 0.0}), 7, 64)
    assert (grey.top, grey.left, grey.height, grey.width) == (whole.top, whole.left, whole.height, whole.width)
    assert (grey.brightness, grey.contrast, grey.saturation) == (1, 1, 1)
    uncropped = drawn(5, 2, ALL.model_copy(update={"crop": 1.0}), 7, 64)
    assert (uncropped.top, uncropped.left, uncropped.height, uncropped.width) == (0, 0, 64, 64)
    assert (uncropped.flip, uncropped.brightness) == (whole.flip, whole.brightness)


def test_geometry_is_torchvisions():
    augment = Augment(views="live", crop=0.3)
    for image, number, view in zip(BATCH, NUMBERS, augmented(BATCH, NUMBERS, 5, augment, 7), strict=True):
        done = drawn(int(number), 5, augment, 7, SIZE)
        planes = torch.from_numpy(image.transpose(2, 0, 1).copy())
        box = (done.top, done.left, done.height, done.width)
        expected = functional.resized_crop(planes, *box, [SIZE, SIZE], antialias=True)
        if done.flip:
            expected = functional.horizontal_flip(expected)
        difference = np.abs(view.astype(int) - expected.permute(1, 2, 0).numpy())
        native = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        assert difference.max() <= (0 if native else 1)


def test_colours_are_torchvisions_and_pillows_up_to_rounding():
    """Both cut fractions off after each of the three steps, which later factors of up to 1.5 enlarge."""
    augment = Augment(views="live", flip=False, crop=1.0, colour=0.5)
    for image, number, view in zip(BATCH, NUMBERS, augmented(BATCH, NUMBERS, 5, augment, 7), strict=True):
        done = drawn(int(number), 5, augment, 7, SIZE)
        planes = torch.from_numpy(image.transpose(2, 0, 1).copy())
        planes = functional.adjust_brightness(planes, done.brightness)
        planes = functional.adjust_contrast(planes, done.contrast)
        planes = functional.adjust_saturation(planes, done.saturation)
        pillow = ImageEnhance.Brightness(Image.fromarray(image)).enhance(done.brightness)
        pillow = ImageEnhance.Contrast(pillow).enhance(done.contrast)
        pillow = ImageEnhance.Color(pillow).enhance(done.saturation)
        for other in (planes.permute(1, 2, 0).numpy(), np.asarray(pillow)):
            difference = view.astype(int) - other
            assert np.abs(difference).max() <= 5
            assert np.abs(difference).mean() < 2
        assert np.abs(view.astype(int) - image).mean() > 2  # the tolerance would not pass an image left alone


def test_keys_differ_with_all_that_changes_a_view_and_with_nothing_else():
    key = views_key(ALL, 7, 3)
    assert json.loads(json.dumps(key)) == key
    assert key["version"] == VIEWS_VERSION
    assert key["torch"] == torch.__version__
    others = [ALL.model_copy(update=change) for change in ({"flip": False}, {"crop": 0.31}, {"colour": 0.4})]
    keys = [key, views_key(ALL, 8, 3), views_key(ALL, 7, 4), *(views_key(other, 7, 3) for other in others)]
    assert len({json.dumps(each) for each in keys}) == len(keys)
    assert views_key(ALL.model_copy(update={"views": 4}), 7, 3) == key
