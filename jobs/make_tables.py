"""Two tables of Fashion-MNIST's images for the jobs with other targets than one class: `python jobs/make_tables.py` writes

data/rotated.parquet  3,000 images, each turned by an angle from -60 to 60 degrees: the angle is to be told (regression.toml)
data/outfits.parquet  2,000 pictures of 2 x 2 places with one to four images, no two of one kind: the kinds are (multilabel.toml)

No image is in two samples of a table. The tables are the same each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from frostline.sources import open_source
from frostline.spec import Data

FOLDER = Path("data")
SIDE = 28


def main() -> None:
    """Write both."""
    source = open_source(Data(path="fashion-mnist"))
    kinds = [name for name in source.names[:60_000] if name is not None]  # of the train images
    pixels = np.stack([np.frombuffer(read(), np.uint8) for read in source.read(range(len(kinds)))])
    images = pixels.reshape(-1, SIDE, SIDE)
    FOLDER.mkdir(exist_ok=True)
    write("rotated", *zip(*rotated(images), strict=True))
    write("outfits", *zip(*outfits(images, kinds), strict=True))


def rotated(images: np.ndarray, count: int = 3_000) -> Iterator[tuple[np.ndarray, float]]:
    """Images on black, turned counter-clockwise, and by how many degrees."""
    random = np.random.default_rng(0)
    for index in random.permutation(len(images))[:count]:
        angle = round(float(random.uniform(-60, 60)), 2)
        framed = Image.fromarray(np.pad(images[index], SIDE // 4))
        yield np.asarray(framed.rotate(angle, Image.Resampling.BILINEAR)), angle


def outfits(images: np.ndarray, kinds: list[str], count: int = 2_000) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Pictures, and the kinds that are in them."""
    random = np.random.default_rng(1)
    left = {kind: random.permutation(np.flatnonzero(np.array(kinds) == kind)).tolist() for kind in sorted(set(kinds))}
    for _ in range(count):
        chosen = random.choice([*left], size=random.integers(1, 5), replace=False).tolist()
        picture = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
        for kind, place in zip(chosen, random.permutation(4).tolist(), strict=False):
            row, column = SIDE * (place // 2), SIDE * (place % 2)
            picture[row : row + SIDE, column : column + SIDE] = images[left[kind].pop()]
        yield picture, sorted(chosen)


def write(name: str, pictures: tuple[np.ndarray, ...], labels: tuple[object, ...]) -> None:
    """A table of PNG images and labels."""
    path = FOLDER / f"{name}.parquet"
    table = {"image": [{"bytes": png(picture), "path": None} for picture in pictures], "label": list(labels)}
    pq.write_table(pa.table(table), path)
    print(f"{path}: {len(labels):,} samples")


def png(pixels: np.ndarray) -> bytes:
    """(H, W) grey pixels as a file."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
