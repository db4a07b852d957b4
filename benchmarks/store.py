"""Random reads from the feature store, against numpy's memory map of one file with the same rows.

Both sides gather the same mini-batches of 128 rows, drawn without order from 8,192, as float32 arrays of their own; the
store in one shard and in eight. Rows are of pooled features (1,280 numbers) and of a cut (9,216 numbers). The ratio is
the store's speed over numpy's, the worst of these; 1 means that the store costs nothing.

    python benchmarks/store.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from _measure import interleaved, say
from frostline.store import Store, key_of

ROWS, BATCH, BATCHES = 8192, 128, 200


def timed(gather: Callable[[np.ndarray], np.ndarray], order: Sequence[np.ndarray]) -> float:
    """Seconds to gather mini-batch after mini-batch."""
    started = time.perf_counter()
    for samples in order:
        gather(samples)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)
    order = [rng.permutation(ROWS)[:BATCH] for _ in range(BATCHES)]
    by_case: dict[str, list[float]] = {}
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        for width in (1280, 9216):
            rows = rng.standard_normal((ROWS, width), dtype=np.float32)
            np.save(Path(folder) / "rows.npy", rows)
            plain = np.load(Path(folder) / "rows.npy", mmap_mode="r")
            for shards in (1, 8):
                about = {"width": width, "shards": shards}
                store = Store(Path(folder) / "store")
                for part in np.array_split(np.arange(ROWS), shards):
                    store.put(key_of(about), about, part, rows[part])
                stored = store.open(key_of(about))

                equal &= all(np.array_equal(stored.gather(each), plain[each]) for each in order[:20])
                seconds = interleaved(
                    {"numpy": partial(timed, plain.__getitem__, order), "store": partial(timed, stored.gather, order)},
                    rounds,
                )
                by_case[f"{width} x 4 B, {shards} shard(s)"] = [
                    theirs / ours for ours, theirs in zip(seconds["store"], seconds["numpy"], strict=True)
                ]
    worst = min(by_case.values(), key=statistics.median)
    say(
        "store",
        {
            "ratio": statistics.median(worst),
            "min": min(worst),
            "max": max(worst),
            "rounds": rounds,
            "counts": {"gathers": BATCHES, "rows": BATCH},
            "equal_scores": equal,
            "cases": {case: statistics.median(found) for case, found in by_case.items()},
        },
    )


if __name__ == "__main__":
    main()
