"""A search of freeze depth in the shape of Nautilus' ResNet-50 workload (SIGMOD 2022), against what it must at least take.

24 fixed trials of timm/resnet18 (random weights) on 400 digits at 64 px, scored on 100: 4 late cuts x 2 batch sizes x 3
learning rates of the head, 3 epochs each, none stopped, features.cache = "all", one thread. The bound is one pass of each
image through the frozen stages of the deepest cut, and for every trial epochs x (train images x a step of what it trains +
val images x a pass through that), by stage times that a plain PyTorch loop takes on inputs in memory: the mean of what
they come to before and after each search. The ratio is the bound over the wall time of the whole search in this process: extraction, audits, rows and
Parquet included, once data and network are loaded, the stages have been timed for the record, and a search of toys has imported
what a process imports once. After these rounds, once:
`speed_up` is over the same search with features.cache = "none", which passes every image live and must give the same
losses; `on_ray` is the bound spread over the cores, over the time on Ray from the first extraction to the end of the last
trial, whose losses must be the same too.

    python benchmarks/depth_search.py [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import frostline
from _measure import interleaved, ratios, say
from _trials import parts_of, search_trial
from frostline import results
from frostline.estimate import facts_of
from frostline.jobfile import parse_job
from frostline.prepare import Prepared, prepare
from frostline.spec import Job
from frostline.testing import TOY_BACKBONE

DEPTHS, TOY_DEPTHS = (2, 3, 4, 5), (1, 2, 3)
BATCHES, HEAD_LRS, EPOCHS = (16, 32), (1e-3, 3e-3, 1e-2), 3
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


def bound_s(prepared: Prepared, depths: Sequence[int]) -> float:
    """Seconds that the search must take at least, by stage times taken now."""
    n_train, n_val = prepared.n_train, len(prepared.dataset.indices("val"))
    parts = {
        (depth, size): parts_of(
            search_trial(prepared.job, "suffix", 0, {"freeze.depth": depth, "train.batch_size": size}, cached=True)
        )
        for depth in depths
        for size in BATCHES
    }
    extraction_s = (n_train + n_val) * min(parts[depths[-1], size].frozen_s for size in BATCHES)
    return extraction_s + sum(
        len(HEAD_LRS) * EPOCHS * (n_train * each.step_s + n_val * each.rest_s) for each in parts.values()
    )


def losses_of(job: Job) -> dict[str, float]:
    """Trial id -> the last loss on val."""
    rows = results.read_trials(job.folder).to_pylist()
    assert [row["status"] for row in rows] == ["complete"] * job.search.trials, rows
    return {row["trial_id"]: row["val_nll"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a toy network at 16 px, one round")
    arguments = parser.parse_args()
    quick, rounds = arguments.quick, 1 if arguments.quick else arguments.rounds
    depths, console = TOY_DEPTHS if quick else DEPTHS, Console(file=io.StringIO())
    losses: dict[str, dict[str, float]] = {}
    counts = {"trials": 0, "extracted": 0}
    with tempfile.TemporaryDirectory() as folder:
        frostline.search(job_of(Path(folder) / "toys", quick=True), inline=True, console=console)
        prepared = prepare(job_of(Path(folder), quick=quick))
        facts_of(prepared)

        def bound() -> float:
            return bound_s(prepared, depths)

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

        seconds = interleaved(
            {"bound before": bound, "search": lambda: searched("search", "all"), "bound after": bound}, rounds
        )
        seconds |= interleaved(
            {
                "live": lambda: searched("live", "none"),
                "on Ray": lambda: searched("on Ray", "all", inline=False),
            },
            1,
        )
    bounds = [statistics.fmean(pair) for pair in zip(seconds["bound before"], seconds["bound after"], strict=True)]
    difference = max(
        abs(losses[name][trial] - losses["search"][trial]) for name in losses for trial in losses["search"]
    )
    cores = len(os.sched_getaffinity(0))
    say(
        "depth_search",
        {
            **ratios(seconds["search"], bounds),
            "rounds": rounds,
            "counts": {**counts, "images": prepared.n_train + len(prepared.dataset.indices("val"))},
            "equal_scores": difference <= TOLERANCE,
            "largest_difference": difference,
            "speed_up": seconds["live"][0] / statistics.median(seconds["search"]),
            "on_ray": statistics.median(bounds) / cores / seconds["on Ray"][0],
            "seconds": {"bound": statistics.median(bounds), **{k: statistics.median(v) for k, v in seconds.items()}},
        },
    )


if __name__ == "__main__":
    main()
