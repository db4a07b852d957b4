"""Unlimited augmentation: 8 trials that share the pass through their frozen stages, against the same 8 one by one.

Every epoch shows each image as it has never been seen, so that nothing of the train split can be stored. Together, the
trials are the lanes of one pack: each mini-batch is varied and passed through the frozen stages once, for all of them, and
the activations of val, which is never varied, are stored (the time this takes counts). One by one, each trial runs the whole
network on its own images. All else is equal: EfficientNet-Lite0 on digits at 64 px, all but the last block and its head
frozen, learning rates of their own, AdamW, 4 epochs of 320 images in mini-batches of 32, 179 for val, one thread. The ratio
is the time one by one over the time together. `share` is the trained stages' part s of the network, from a step of theirs
timed in this run, which is 3 s; `ceiling` is what sharing the rest could give, (1 + 2 s) / ((1 - s) / 8 + 3 s). Varying an
image once, and passing val once, come on top of it.

    python benchmarks/live_augmentation.py [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from _measure import interleaved, ratios, say
from _trials import parts_of, search_trial
from frostline.extract import extract, survey
from frostline.features import Feed
from frostline.jobfile import parse_job
from frostline.outcome import EpochRecord, Outcome
from frostline.pack import run_pack
from frostline.prepare import prepare
from frostline.spec import Job
from frostline.store import Store
from frostline.testing import TOY_BACKBONE
from frostline.trialspec import TrialSpec
from frostline.work import Survey
from frostline.world import World

LRS, HEAD_LRS = (1e-4, 3e-4), (3e-4, 1e-3, 3e-3, 1e-2)
TOLERANCE = 1e-4  # between losses in float32: sums in another order, amplified by AdamW


def job_of(root: Path, quick: bool) -> Job:
    """A search of one cut under live views."""
    arm = {
        "strategy": "freeze_depth",
        "space": {"freeze.depth": [2 if quick else 7], "train.lr": LRS, "train.head_lr": HEAD_LRS},
    }
    small = {"image_size": 16, "per_class": 6}
    return parse_job(
        {
            "name": "live_augmentation",
            "results": str(root / "study"),
            "data": {"path": "digits", "val": 0.1, **(small if quick else {"image_size": 64, "per_class": 32})},
            "backbone": {"name": TOY_BACKBONE, "weights": "random"} if quick else {"name": "efficientnet-lite0"},
            "augment": {"views": "live", "colour": 0.2},
            "train": {"epochs": 2 if quick else 4, "batch_size": 32},
            "arms": {"suffix": arm},
        },
        [],
    )


class Ran:
    """The losses and the outcomes of trials, and the images that passed through frozen stages."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.feed = Feed()

    def run(self, specs: Sequence[TrialSpec], world: World) -> None:
        run_pack(specs, feed=self.feed, world=world, report=self.hear, finish=self.outcomes.update)

    def hear(self, records: Mapping[str, EpochRecord]) -> dict[str, bool]:
        for trial_id, record in records.items():
            self.losses.setdefault(trial_id, []).append(record.val["nll"])
        return dict.fromkeys(records, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a toy network at 16 px, one round")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(job_of(Path(folder), arguments.quick)).job
        values = [
            {"freeze.depth": job.arms["suffix"].space["freeze.depth"][0], "train.lr": lr, "train.head_lr": head_lr}
            for lr, head_lr in itertools.product(LRS, HEAD_LRS)
        ]
        sharing, alone = (
            [search_trial(job, "suffix", number, each, cached=cached) for number, each in enumerate(values)]
            for cached in (True, False)
        )
        world = World.here(job.resources)
        ran: dict[str, Ran] = {}
        parts = [parts_of(sharing[0])]

        def together() -> float:
            Store(job.features.path or "").clean()
            found = ran["together"] = Ran()
            started = time.perf_counter()
            for shard in survey(Survey(tuple(sharing), None, (), 1), world, lambda *_: None).shards:
                extract(shard, found.feed, world)
            found.run(sharing, world)
            return time.perf_counter() - started

        def one_by_one() -> float:
            found = ran["one by one"] = Ran()
            started = time.perf_counter()
            for spec in alone:
                found.run([spec], world)
            return time.perf_counter() - started

        seconds = interleaved({"together": together, "one by one": one_by_one}, rounds)
        parts.append(parts_of(sharing[0]))
    losses = {name: np.array([each.losses[spec.trial_id] for spec in alone]) for name, each in ran.items()}
    difference = float(np.abs(losses["together"] - losses["one by one"]).max())
    step_s, frozen_s = (min(getattr(each, name) for each in parts) for name in ("step_s", "frozen_s"))
    s = step_s / (step_s + 3 * frozen_s)
    say(
        "live_augmentation",
        {
            **ratios(seconds["together"], seconds["one by one"]),
            "rounds": rounds,
            "counts": {
                "trials": len(alone),
                "passes_together": ran["together"].feed.images_forwarded,
                "passes_one_by_one": sum(each.row["images_forward"] for each in ran["one by one"].outcomes.values()),
            },
            "equal_scores": difference <= TOLERANCE,
            "largest_difference": difference,
            "share": s,
            "ceiling": (1 + 2 * s) / ((1 - s) / len(alone) + 3 * s),
            "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        },
    )


if __name__ == "__main__":
    main()
