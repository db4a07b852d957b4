"""A search of freeze depth in the shape of Nautilus' ResNet-50 workload (SIGMOD 2022), against what it must at least take.

24 fixed trials of timm/resnet18 (random weights) on 400 digits at 64 px, scored on 100: 4 late cuts x 2 batch sizes x 3
learning rates of the head, 3 epochs each, none stopped, features.cache = "all", one thread. The bound is one pass of each
image through the frozen stages of the deepest cut, and for every trial epochs x (train images x a step of what it trains +
val images x a pass through that), by stage times that a plain PyTorch loop takes on inputs in memory. They are taken before
each trial or pack and after each of its epochs, with the clock of the search stopped: a machine with other guests is a tenth slower
in some minutes than in others. The ratio is the bound over the wall time of the whole search in this process: extraction, audits,
rows and Parquet included, once data and network are loaded, the stages have been timed for the record, and a search of toys has
imported what a process imports once. After these rounds, once:
`speed_up` is over the same search with features.cache = "none", which passes every image live and must give the same
losses; `on_ray` is the bound spread over the cores, over the time on Ray from the first extraction to the end of the last
trial, whose losses must be the same too.

    python benchmarks/depth_search.py [--rounds 3] [--quick]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

import frostline.inline
from _measure import interleaved, ratios, say
from _trials import Parts, parts_of
from frostline import results
from frostline.estimate import facts_of
from frostline.jobfile import parse_job
from frostline.outcome import EpochRecord
from frostline.pack import Report, run_pack
from frostline.prepare import prepare
from frostline.spec import Job
from frostline.testing import TOY_BACKBONE
from frostline.trialspec import TrialSpec

DEPTHS, TOY_DEPTHS = (2, 3, 4, 5), (1, 2, 3)
BATCHES, HEAD_LRS, EPOCHS = (16, 32), (1e-3, 3e-3, 1e-2), 3
LOOK_S = 0.4
TOLERANCE = 1e-4  # between losses in float32: sums in another order, amplified by AdamW


def job_of(root: Path, *, quick: bool, cache: str = "all") -> Job:
    """The search, with its rows and its features under `root`."""
    depths = TOY_DEPTHS if quick else DEPTHS
    space = {"freeze.depth": depths, "train.batch_size": BATCHES, "train.head_lr": HEAD_LRS}
    return parse_job(
        {
            "name": "depth_search",
            "results": str(root / "study"),
            "data": {
                "path": "digits",
                "image_size": 16 if quick else 64,
                "per_class": 10 if quick else 40,
                "val": 100 / 1797,
            },
            "backbone": {"name": TOY_BACKBONE if quick else "timm/resnet18", "weights": "random"},
            "train": {"epochs": EPOCHS},
            "features": {"cache": cache},
            "search": {
                "trials": len(depths) * len(BATCHES) * len(HEAD_LRS),
                "sampler": "grid",
                "pruner": {"kind": "none"},
            },
            "confirm": {"seeds": 0},
            "arms": {"suffix": {"strategy": "freeze_depth", "space": space}},
        },
        [],
    )


@dataclass
class Looks:
    """What the parts of trials take, looked at beside them."""

    parts: dict[TrialSpec, list[Parts]] = field(default_factory=lambda: defaultdict(list))
    seconds: float = 0.0
    """What the looking took."""

    def look(self, specs: Sequence[TrialSpec]) -> None:
        """At trials of one cut and batch size, as those of a pack are."""
        started = time.perf_counter()
        found = parts_of(specs[0], LOOK_S)
        for spec in specs:
            self.parts[spec].append(found)
        self.seconds += time.perf_counter() - started

    def run_pack(self, specs: Sequence[TrialSpec], *, report: Report, **others: Any) -> None:
        """In place of the search's own."""

        def looking(records: Mapping[str, EpochRecord]) -> Mapping[str, bool]:
            self.look(specs)
            return report(records)

        self.look(specs)
        run_pack(specs, report=looking, **others)

    def bound_s(self, n_train: int, n_val: int) -> float:
        """Seconds that the search must take at least."""
        depths = {spec: spec.config.freeze.depth for spec in self.parts}
        deepest = [each for spec, parts in self.parts.items() if depths[spec] == max(depths.values()) for each in parts]
        return (n_train + n_val) * mean_s(deepest, "frozen_s") + sum(
            EPOCHS * (n_train * mean_s(parts, "step_s") + n_val * mean_s(parts, "rest_s"))
            for parts in self.parts.values()
        )


def mean_s(parts: Sequence[Parts], name: str) -> float:
    return statistics.fmean(getattr(each, name) for each in parts)


def losses_of(job: Job) -> dict[str, float]:
    """Trial id -> the last loss on val."""
    rows = results.read_trials(job.folder).to_pylist()
    assert [row["status"] for row in rows] == ["complete"] * job.search.trials, rows
    return {row["trial_id"]: row["val_nll"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a toy network at 16 px, one round")
    arguments = parser.parse_args()
    quick, rounds = arguments.quick, 1 if arguments.quick else arguments.rounds
    console = Console(file=io.StringIO())
    losses: dict[str, dict[str, float]] = {}
    counts = {"trials": 0, "extracted": 0}
    with tempfile.TemporaryDirectory() as folder:
        frostline.search(job_of(Path(folder) / "toys", quick=True), inline=True, console=console)
        prepared = prepare(job_of(Path(folder), quick=quick))
        facts_of(prepared)

        n_train, n_val = prepared.n_train, len(prepared.dataset.indices("val"))
        bounds: list[float] = []

        def searched(name: str, cache: str, *, inline: bool = True) -> float:
            with tempfile.TemporaryDirectory(dir=folder) as root:
                job = job_of(Path(root), quick=quick, cache=cache)
                started = time.perf_counter()
                frostline.search(job, inline=inline, console=console)
                seconds = time.perf_counter() - started
                losses[name] = losses_of(job)
                extractions = results.read_extractions(job.folder).to_pylist()
                if name == "search":
                    counts.update(trials=job.search.trials, extracted=sum(each["images"] for each in extractions))
                if not inline:
                    ends = [row["finished_at"] for row in results.read_trials(job.folder).to_pylist()]
                    began = min(each["started_at"] for each in extractions)
                    seconds = (max(ends) - began).total_seconds()
            return seconds

        def looked_at() -> float:
            looks = Looks()
            with patch.object(frostline.inline, "run_pack", looks.run_pack):
                seconds = searched("search", "all") - looks.seconds
            bounds.append(looks.bound_s(n_train, n_val))
            return seconds

        seconds = interleaved({"search": looked_at}, rounds)
        seconds |= interleaved(
            {
                "live": lambda: searched("live", "none"),
                "on Ray": lambda: searched("on Ray", "all", inline=False),
            },
            1,
        )
    difference = max(
        abs(losses[name][trial] - losses["search"][trial]) for name in losses for trial in losses["search"]
    )
    cores = len(os.sched_getaffinity(0))
    say(
        "depth_search",
        {
            **ratios(seconds["search"], bounds),
            "rounds": rounds,
            "counts": {**counts, "images": n_train + n_val},
            "equal_scores": difference <= TOLERANCE,
            "largest_difference": difference,
            "speed_up": seconds["live"][0] / statistics.median(seconds["search"]),
            "on_ray": statistics.median(bounds) / cores / seconds["on Ray"][0],
            "seconds": {"bound": statistics.median(bounds), **{k: statistics.median(v) for k, v in seconds.items()}},
        },
    )


if __name__ == "__main__":
    main()
