"""`frostline predict` on Fashion-MNIST's test set, against a bare PyTorch loop over the same images.

Both read the 10,000 images from the IDX file, resize each to 64 pixels by Pillow, normalise, and pass them in batches of 64 through
the same channels_last EfficientNet-Lite0 and head in eval mode, on one thread of arithmetic. The bare loop keeps the logits in a
list. Frostline also lists and checks the data, names every sample, commits probabilities to Parquet in parts with checksums and
fsync, reads them back, and scores them; it decodes in threads while the network runs. The ratio is Frostline's images a second
over the bare loop's; loading the bundle is in neither. `over_network` compares with the network alone, on pixels decoded before:
no loop can be above 1 on one core.

    python benchmarks/predict.py [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

import frostline
from _measure import interleaved, ratios, say
from frostline import idx, parts, predict
from frostline.bundle import load_bundle
from frostline.commit import committed_parts, read_table
from frostline.files import locate
from frostline.jobfile import parse_job
from frostline.metrics import probabilities
from frostline.sources import FASHION_MNIST

BATCH, SIZE = 64, 64
IMAGES = Path(FASHION_MNIST) / "t10k-images-idx3-ubyte.gz"


def bundle_in(folder: Path) -> Path:
    """A head on Lite0 that has seen 20 digits a class once: what it says of clothes does not matter here."""
    arm = {"strategy": "linear_probe", "space": {"train.head_lr": 1e-2}}
    job = {
        "name": "predict",
        "results": str(folder / "study"),
        "data": {"path": "digits", "image_size": SIZE, "per_class": 20},
        "train": {"epochs": 1},
        "search": {"trials": 1},
        "confirm": {"seeds": 1},
        "arms": {"probe": arm},
    }
    return frostline.search(parse_job(job), inline=True) / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="1 round of 640 images; shows that it runs")
    arguments = parser.parse_args()
    rounds, images = (1, 640) if arguments.quick else (arguments.rounds, 10_000)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = bundle_in(folder)
        bundle = load_bundle(path)
        torch.set_num_threads(bundle.threads)
        shown = bundle.about["preprocessing"]
        mean, std = (255 * torch.tensor(shown[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        kept: list[torch.Tensor] = []
        outs: list[Path] = []

        def network(pixels: np.ndarray) -> None:
            kept.append(bundle.network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub_(mean).div_(std)))

        def resized(grey: np.ndarray) -> np.ndarray:
            image = Image.fromarray(grey).convert("RGB")
            return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))

        def bare() -> float:
            started = time.perf_counter()
            kept.clear()
            raw = idx.read_images(locate(str(IMAGES)))[:images]
            with torch.inference_mode():
                for first in range(0, images, BATCH):
                    network(np.stack([resized(grey) for grey in raw[first : first + BATCH]]))
            return time.perf_counter() - started

        decoded = np.stack([resized(grey) for grey in idx.read_images(locate(str(IMAGES)))[:images]])

        def alone() -> float:
            started = time.perf_counter()
            with torch.inference_mode():
                for first in range(0, images, BATCH):
                    network(decoded[first : first + BATCH])
            kept.clear()
            return time.perf_counter() - started

        def ours() -> float:
            outs.append(folder / f"out-{len(outs)}")
            started = time.perf_counter()
            predict.predict_data(path, "fashion-mnist", outs[-1], split="test", console=Console(file=io.StringIO()))
            return time.perf_counter() - started

        predict.load_bundle = lambda _: bundle
        predict.worth_ray = lambda *_, **__: False  # both in one process
        if images < 10_000:
            predict._in_split = lambda *_: range(60_000, 60_000 + images)
        found = interleaved({"network alone": alone, "bare loop": bare, "frostline predict": ours}, rounds)
        bare()
        schema = parts.schema_of(bundle.classes, features=False)
        rows = read_table(outs[-1], predict.RECORD, predict.RECORD, schema)
        said = np.array(rows["probabilities"].to_pylist(), np.float32)
        equal = bool(np.abs(said - probabilities(torch.cat(kept).numpy())).max() < 1e-5)
        counts = {"images": len(said), "parts": len(committed_parts(outs[-1], predict.RECORD)), "batch": BATCH}
    say(
        "predict",
        {
            **ratios(found["frostline predict"], found["bare loop"]),
            "rounds": rounds,
            "counts": counts,
            "equal_scores": equal,
            "images_per_s": images / statistics.median(found["frostline predict"]),
            "over_network": ratios(found["frostline predict"], found["network alone"])["ratio"],
        },
    )


if __name__ == "__main__":
    main()
