"""What it costs that a study loses nothing: 1,000 linear heads searched as they are, over the same search without what protects it.

Both sides are one study in this process (digits at 16 px, the toy backbone, TPE over two dimensions, packs, an empty feature
store): proposals, training, rows in Parquet. `bare` is without fsync, checksums of pages, files and job.json, temporary names, links
and renames of a commit, and without the lease; nothing in the product does that, it is patched out here. What remains on both sides
is the proof that frozen tensors have not moved, which is part of a result. `ratio` is the seconds of the whole over those of the bare
study, round by round, `cpu_ratio` the same of CPU seconds; a study by itself varies by a tenth, so that many rounds are needed. More
precise is `protected_s`, the seconds that one study of each side took in what is otherwise on the other: `share` is their difference
over the bare study's time.

    python benchmarks/reliability.py [--trials 1000] [--rounds 40] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from _measure import interleaved, interval, ratios, say
from frostline import claim, commit, ledger, results, shards, study
from frostline.data import splits_table
from frostline.estimate import facts_of
from frostline.inline import run_inline
from frostline.prepare import Prepared, prepare
from frostline.testing import toy_job

SPACE = {
    "train.head_lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "train.weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
}


def without_protection() -> contextlib.ExitStack:
    """Within it, files are written straight to their names, as any script does."""
    bare = contextlib.ExitStack()
    bare.enter_context(patch.object(os, "fsync", lambda _: None))
    for (owner, name), instead in PROTECTING.items():
        bare.enter_context(patch.object(owner, name, instead))
    return bare


def plain(table: pa.Table) -> bytes:
    """A Parquet file like those of a study, without checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=True)
    return sink.getvalue().to_pybytes()


def write_parts(folder: Path, tables: Mapping[str, pa.Table], part: int) -> None:
    """One file a table, as a script would; with what readers of a study look for."""
    *others, _ = tables
    about = {commit._COMMIT: b"0" * 12, commit._TABLES: json.dumps(others).encode()}
    for name, table in tables.items():
        (folder / name).mkdir(exist_ok=True)
        described = table.replace_schema_metadata({**(table.schema.metadata or {}), **about})
        (folder / name / f"part-{part:06d}.parquet").write_bytes(plain(described))


PROTECTING: dict[tuple[Any, str], Callable[..., Any]] = {
    (ledger, "commit_part"): write_parts,
    (commit, "sealed"): plain,
    (commit, "unsealed"): lambda _, data: pq.ParquetFile(pa.BufferReader(data)),
    (commit, "_write"): lambda path, data: path.write_bytes(data),
    (claim, "digest"): lambda _: None,
    (study, "take_lease"): lambda *_: SimpleNamespace(release=lambda: None),
    (shards, "write"): lambda path, content, _: path.write_bytes(b"".join(content)),
}
"""What protects a study, and what a script would do instead; fsync beside them."""


@contextlib.contextmanager
def counted(seen: dict[str, float]) -> Iterator[None]:
    """Counts fsyncs and commits, and the seconds in what protects a study, or is there instead; nested calls once."""
    within = False

    def timed(call: Callable[..., Any], count: str | None) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            nonlocal within
            if count:
                seen[count] += 1
            if within:
                return call(*arguments)
            within, began = True, time.perf_counter()
            try:
                return call(*arguments)
            finally:
                within = False
                seen["protected_s"] += time.perf_counter() - began

        return counting

    counts = {(os, "fsync"): "fsyncs", (ledger, "commit_part"): "commits"}
    with contextlib.ExitStack() as patched:
        for owner, name in [(os, "fsync"), *PROTECTING]:
            wrapped = timed(getattr(owner, name), counts.get((owner, name)))
            patched.enter_context(patch.object(owner, name, wrapped))
        yield


def run(prepared: Prepared, facts: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """One study from beginning to end, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=root))
    features = prepared.job.features.model_copy(update={"path": str(folder / "features")})
    job = prepared.job.model_copy(update={"results": str(folder / "study"), "features": features})
    seen = {"fsyncs": 0, "commits": 0, "protected_s": 0.0}
    with counted(seen):
        wall, cpu = time.perf_counter(), time.process_time()
        run_inline(job, facts, splits_table(prepared.dataset), who={}, show=lambda _: None)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rows = results.read_trials(job.folder).select(["trial_id", "status", "val_score", "epochs"]).sort_by("trial_id")
    return {"wall_s": wall, "cpu_s": cpu, "rows": rows.to_pylist(), **seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="64 trials, one round")
    arguments = parser.parse_args()
    trials, rounds = (64, 1) if arguments.quick else (arguments.trials, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        arms = {"probe": {"strategy": "linear_probe", "space": SPACE}}
        data = {"path": "digits", "image_size": 16, "per_class": 50}
        options = [f"search.trials={trials}", "confirm.seeds=0", "train.epochs=10", "features.cache=all"]
        prepared = prepare(toy_job(root / "unused", options, arms=arms, data=data))
        facts = facts_of(prepared)
        found: dict[str, list[dict[str, Any]]] = {"whole": [], "bare": []}

        def whole() -> float:
            found["whole"].append(run(prepared, facts, root))
            return found["whole"][-1]["wall_s"]

        def bare() -> float:
            with without_protection():
                found["bare"].append(run(prepared, facts, root))
            return found["bare"][-1]["wall_s"]

        run(prepared, facts, root)  # what a process does once
        wall = interleaved({"whole": whole, "bare": bare}, rounds)
    cpu = {side: [each["cpu_s"] for each in seen] for side, seen in found.items()}
    protected_s = {side: statistics.median(each["protected_s"] for each in seen) for side, seen in found.items()}
    say(
        "reliability",
        {
            **ratios(wall["bare"], wall["whole"]),
            **interval(wall["bare"], wall["whole"]),
            "rounds": rounds,
            "counts": {name: found["whole"][-1][name] for name in ("commits", "fsyncs")} | {"trials": trials},
            "equal_scores": all(each["rows"] == found["whole"][0]["rows"] for seen in found.values() for each in seen),
            "cpu_ratio": ratios(cpu["bare"], cpu["whole"]),
            "protected_s": protected_s,
            "share": (protected_s["whole"] - protected_s["bare"]) / statistics.median(wall["bare"]),
            "wall_s": {side: statistics.median(seconds) for side, seconds in wall.items()},
            "cpu_s": {side: statistics.median(seconds) for side, seconds in cpu.items()},
        },
    )


if __name__ == "__main__":
    main()
