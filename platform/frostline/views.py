"""Views: random transforms of train images, each fixed by (augment seed, sample number, view number) and nothing else.

A view is drawn from a generator of its own, and its pixels come from operations that round the same way whatever the
batch, the threads and the processor: so the views that were computed once are those that are computed every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from frostline.spec import Augment

VIEWS_VERSION = 1  # part of every view's key: raise it whenever the same arguments may come to give other pixels

_WIDEST = math.log(4 / 3)  # aspect ratios of crops lie between 3/4 and 4/3


@dataclass(frozen=True)
class View:
    """What is done to one image: crop and scale back, recolour, mirror."""

    flip: bool
    top: int  # of the crop, in pixels, as are the next three
    left: int
    height: int
    width: int
    brightness: float  # factors: 1.0 leaves the image as it is
    contrast: float
    saturation: float


def view_of(epoch: int, augment: Augment) -> int | None:
    """The number of the view that `epoch` (from 1) shows; None where images are shown as they are."""
    if augment.views == 0:
        return None
    return epoch - 1 if augment.views == "live" else (epoch - 1) % augment.views


def views_key(augment: Augment, seed: int, view: int) -> dict[str, Any]:
    """JSON values over everything, besides the images and their numbers, that could change the pixels of a view."""
    strengths = augment.model_dump(mode="json", exclude={"views"})  # view 1 is the same among two views and among ten
    return {"version": VIEWS_VERSION, "torch": str(torch.__version__), "seed": seed, "view": view, **strengths}


def augmented(pixels: np.ndarray, samples: np.ndarray, view: int, augment: Augment, seed: int) -> np.ndarray:
    """View number `view` of the images `pixels`, square (B, H, W, 3) uint8, which are the samples numbered `samples`,
    (B,): a new array of the same shape and type."""
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.shape[1:] == (pixels.shape[1], pixels.shape[1], 3), pixels.shape
    views = np.empty(pixels.shape, np.uint8)
    for out, image, sample in zip(views, pixels, samples, strict=True):
        out[:] = _shown(image, drawn(int(sample), view, augment, seed, len(image)))
    return views


def drawn(sample: int, view: int, augment: Augment, seed: int, size: int) -> View:
    """The view of one sample whose image is `size` pixels wide and high.

    The share of the area is uniform from `augment.crop` to 1, the aspect ratio log-uniform over what then fits, and the
    crop's sides are rounded up, so that it never keeps less. Every value is drawn whether it is used or not: switching
    one part of the augmentation off leaves the others as they were.
    """
    generator = np.random.Philox(key=np.array([seed, view], np.uint64), counter=np.array([0, sample, 0, 0], np.uint64))
    flip, share, ratio, top, left, *colours = ((generator.random_raw(8) >> 11) * 2.0**-53).tolist()  # in [0, 1)
    share = augment.crop + (1 - augment.crop) * share
    stretch = math.exp((2 * ratio - 1) * min(_WIDEST, -math.log(share)))
    height = min(size, math.ceil(size * math.sqrt(share / stretch)))
    width = min(size, math.ceil(size * math.sqrt(share * stretch)))
    brightness, contrast, saturation = (1 + augment.colour * (2 * colour - 1) for colour in colours)
    return View(
        flip=augment.flip and flip < 0.5,
        top=int(top * (size - height + 1)),
        left=int(left * (size - width + 1)),
        height=height,
        width=width,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
    )


def _shown(image: np.ndarray, view: View) -> np.ndarray:
    shown = image[view.top : view.top + view.height, view.left : view.left + view.width]
    if shown.shape != image.shape:
        # torchvision's resize gives other pixels on processors without AVX2; this, which it calls on the others, does not
        planes = torch.from_numpy(shown.copy()).permute(2, 0, 1).unsqueeze(0)
        scaled = interpolate(planes, image.shape[:2], mode="bilinear", antialias=True)
        shown = scaled.squeeze(0).permute(1, 2, 0).numpy()
    if (view.brightness, view.contrast, view.saturation) != (1, 1, 1):
        shown = _recoloured(shown.astype(np.float32), view)
    return shown[:, ::-1] if view.flip else shown


def _recoloured(image: np.ndarray, view: View) -> np.ndarray:
    """As Pillow's ImageEnhance, on whole numbers in (H, W, 3) float32. Not torchvision's adjust functions, which give other
    pixels on processors without AVX2: here every operation is rounded by itself."""
    image = _blend(np.float32(0), image, view.brightness)
    image = _blend(np.float32(_grey(image).mean(dtype=np.float64)), image, view.contrast)
    return _blend(_grey(image)[..., None], image, view.saturation)


def _blend(base: np.ndarray | np.float32, image: np.ndarray, factor: float) -> np.ndarray:
    """`base` at factor 0, `image` at 1, beyond it above: rounded to whole numbers from 0 to 255."""
    return np.clip(np.rint(base + np.float32(factor) * (image - base)), 0, 255)


def _grey(image: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601) in whole numbers, (H, W) float32, whose sum is therefore exact in any order."""
    red, green, blue = (np.float32(weight) * image[..., i] for i, weight in enumerate((0.299, 0.587, 0.114)))
    return np.rint(red + green + blue)
