"""Extraction into the feature store, against a bare PyTorch loop over the same images.

Both pass the same Fashion-MNIST images (64 px, decoded before) through the same channels_last EfficientNet-Lite0 in eval
mode, in batches of 64, on one thread. The bare loop keeps the pooled features of the batches in a list; extraction also
makes the activations of the cuts asked for, writes them to disk with checksums and syncs them. The ratio is extraction's
speed over the bare loop's, for pooled features alone; `all_cuts` is the same for every cut that can be resumed.

    python benchmarks/extraction.py [--images 2048] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from _measure import interleaved, ratios, say
from frostline.cuts import cuts_of
from frostline.extract import extract
from frostline.features import EVAL_BATCH, Feed, on_device
from frostline.jobfile import parse_job
from frostline.prepare import prepare
from frostline.store import Store, key_of
from frostline.trial import origin_of
from frostline.trialspec import TrialSpec, configure, search_seeds, trial_of
from frostline.work import Shard
from frostline.world import World


def spec_for(root: Path, data: str) -> TrialSpec:
    """A trial of a head on Lite0 whose features lie under `root`."""
    arm = {"strategy": "linear_probe", "space": {"train.head_lr": [1e-3, 1e-2]}}
    raw = {"name": "extraction", "data": {"path": data, "image_size": 64}, "arms": {"probe": arm}}
    job = prepare(parse_job({**raw, "results": str(root / "study")}, [])).job
    seed, seeds = search_seeds(job, "probe", 0)
    return trial_of(
        job,
        configure(job, job.arms["probe"], {"train.head_lr": 1e-3}),
        seeds,
        trial_id="probe-00000",
        arm="probe",
        number=0,
        round="search",
        seed=seed,
        cached=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="fashion-mnist", help="a job's data.path")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_for(Path(folder), arguments.data)
        world = World.here(spec.resources)
        origin = origin_of(spec, world)
        samples = origin.dataset.indices("train")[: arguments.images]
        last, feed = len(origin.backbone.stages), Feed()
        store = Store(spec.features.path or "")
        network = on_device(origin.backbone, world.device)
        mean, std = (
            255 * torch.tensor(each).view(1, 3, 1, 1)
            for each in (origin.backbone.inputs.mean, origin.backbone.inputs.std)
        )
        kept: list[torch.Tensor] = []

        def bare() -> float:
            started = time.perf_counter()
            kept.clear()
            with torch.inference_mode():
                for first in range(0, len(samples), EVAL_BATCH):
                    pixels = torch.from_numpy(origin.dataset.inputs[samples[first : first + EVAL_BATCH]])
                    kept.append(network(pixels.permute(0, 3, 1, 2).float().sub_(mean).div_(std)))
            return time.perf_counter() - started

        def extraction(cuts: tuple[int, ...]) -> float:
            store.clean()
            started = time.perf_counter()
            extract(Shard(spec, cuts, (), None, samples), feed, world)
            return time.perf_counter() - started

        found = interleaved(
            {
                "bare loop": bare,
                "pooled features": lambda: extraction((last,)),
                "all cuts": lambda: extraction(tuple(cuts_of(origin.backbone, origin.dataset.inputs.shape[1]))),
            },
            arguments.rounds,
        )
        stored = store.open(key_of(origin.about(last, None))).gather(samples)
        equal = bool(np.abs(stored - torch.cat(kept).numpy()).max() < 1e-5)
    say(
        "extraction",
        {
            **ratios(found["pooled features"], found["bare loop"]),
            "rounds": arguments.rounds,
            "counts": {
                "images": len(samples),
                "passes": feed.images_forwarded // (2 * arguments.rounds) / len(samples),
            },
            "equal_scores": equal,
            "images_per_s": len(samples) / statistics.median(found["pooled features"]),
            "all_cuts": ratios(found["all cuts"], found["bare loop"])["ratio"],
        },
    )


if __name__ == "__main__":
    main()
