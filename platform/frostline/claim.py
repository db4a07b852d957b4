"""Taking a study's folder: its lease, and the job that it was begun with, against which a later one is held."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from frostline import results
from frostline.commit import DamagedFile, Lease, StudyBusy, committed_parts, write_file
from frostline.models import digest
from frostline.spec import Job

DYING_SECONDS = 30.0
MAY_DIFFER: dict[str, Any] = {
    "results": True,
    "features": {"path", "budget_gb"},
    "scaling": True,
}  # where things are, changes no number
WEIGHTS, NAMED_WEIGHTS = "backbone.weights", {"pretrained", "random"}  # a file's path may differ, what it holds may not
MAY_GROW = ("search.trials",)  # what may change, upwards, when a study is opened again


class StudyMismatchError(ValueError):
    """A study folder that was begun with another job, or on other data or weights."""


def take_lease(folder: Path, who: Mapping[str, Any]) -> Lease:
    """Hold the folder. Where the holder's driver is dead, its study actor is about to follow: wait for that."""
    try:
        return Lease.take(folder, who)
    except StudyBusy:
        holder = json.loads((folder / "lease.json").read_text(encoding="utf-8") or "{}")
        driver = holder.get("driver")
        if driver is None or holder.get("host") != socket.gethostname() or Path(f"/proc/{driver}").exists():
            raise
        return Lease.take(folder, who, wait_s=DYING_SECONDS)


def record_job(folder: Path, job: Job, facts: Mapping[str, Any], splits: pa.Table) -> Mapping[str, Any]:
    """Write the resolved job and the splits into a new study; hold them against those that an old one was begun with.

    Answers the facts that the study was begun with: what is stored was decided by these.
    """
    path = folder / "job.json"
    record = {"job": job.model_dump(mode="json", exclude=MAY_DIFFER), "facts": dict(facts)}
    if path.exists() and committed_parts(folder, results.RECORD):
        old = results.read_job(folder)
        changed = differences(completed(old["job"]), record["job"])
        if WEIGHTS in changed and not NAMED_WEIGHTS.intersection(changed[WEIGHTS]):
            del changed[WEIGHTS]  # two files; that they hold the same is held by weights_hash
        refused = {key: pair for key, pair in changed.items() if key not in MAY_GROW or pair[1] < pair[0]}
        refused |= differences(
            {key: old["facts"].get(key) for key in results.FIXED_FACTS},
            {key: facts.get(key) for key in results.FIXED_FACTS},
        )
        if refused:
            lines = [f"  {key}: was {was!r}, now {now!r}" for key, (was, now) in refused.items()]
            raise StudyMismatchError(
                f"{folder} holds a study of another job. What differs:\n"
                + "\n".join(lines)
                + "\nGive this job another "
                "name (name=NEW), or set these keys back to continue the study; only search.trials may grow."
            )
        record["facts"] = old["facts"]
        if not changed and _has_splits(folder):
            return old["facts"]
    results.write_splits(folder, splits)
    read = json.loads(json.dumps(record))
    write_file(path, (json.dumps({**read, "digest": digest(read)}, indent=2) + "\n").encode())
    return record["facts"]


def completed(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded job with the defaults of the keys that this version has and its own had not: a study goes on where nothing but
    such a key is new. As it is where it is no job of this version."""
    try:
        return Job.model_validate(recorded).model_dump(mode="json", exclude=MAY_DIFFER)
    except ValidationError:
        return recorded


def _has_splits(folder: Path) -> bool:
    try:
        results.read_splits(folder)
    except DamagedFile:
        return False
    return True


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) wherever two nested mappings differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        here, before, after = f"{path}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= differences(before, after, f"{here}.")
        elif json.dumps(before) != json.dumps(after):  # 1 and 1.0 are different freeze depths
            found[here] = (before, after)
    return found
