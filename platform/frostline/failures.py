"""What can go wrong with a trial: the kinds of failure, which of them are tried again, and when a search is past hope."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Then = Literal["fails", "again", "stops"]
Failure = tuple[str, str]
"""The kind of a failure and its reason, as in the row."""

FEWEST = 5
"""Trials that fail alike before a search is given up, at least."""
VALUES = 4
"""Of each searched key, among them: all that it has, or so many."""


@dataclass(frozen=True)
class Kind:
    """A kind of failure, the `error_kind` of a row."""

    what: str
    """What has happened."""
    then: Then
    """What becomes of the trial. It fails, and what has failed is not run again; or it is tried `again`, see that function; or the
    search stops, and the trial has no row and runs again with the next command."""
    remedy: str
    """What a user can do, as the end of a sentence."""
    escapes: bool = False
    """Whether trials with other values, or at another time, may well not meet it: it never stops a search."""


KINDS = {
    "oom": Kind(
        "memory was not enough, of the device or the process",
        "fails",
        "lower train.batch_size, or search.lanes, or give a trial more memory",
        escapes=True,
    ),
    "non_finite": Kind("a loss or a score is NaN or infinite", "fails", "lower the learning rates", escapes=True),
    "audit": Kind(
        "training moved what the freeze plan holds fixed",
        "fails",
        "look at the column `audit`: the backbone changes tensors that it was told to hold",
    ),
    "data": Kind("the data cannot be read or do not suffice", "fails", "mend the data, or data.path, on every node"),
    "user_error": Kind("the job, the backbone or a file is wrong", "fails", "mend what the reason names"),
    "disk_full": Kind("a disk is full", "stops", "free space there"),
    "no_resources": Kind(
        "the cluster has no room for the workers of a trial",
        "again",
        "add nodes, or lower scaling.workers or resources",
        escapes=True,
    ),
    "preempted": Kind("a node was taken away with notice", "again", "add nodes that stay", escapes=True),
    "worker_lost": Kind(
        "the process, or its node, is gone", "again", "look at memory and the node's system log", escapes=True
    ),
    "timeout": Kind(
        "workers waited for each other for too long",
        "again",
        "look at the network, or raise scaling.timeout_s",
        escapes=True,
    ),
    "internal": Kind("anything else", "fails", "look at the column `error`: it holds the end of the traceback"),
}

AGAIN = tuple(name for name, kind in KINDS.items() if kind.then == "again")
"""What a trial is not to blame for."""

_ERRNOS = {errno.ENOSPC: "disk_full", errno.EDQUOT: "disk_full", errno.ENOMEM: "oom"}
_CLASSES = {  # by name, so that nobody imports torch and Ray for it; the nearest ancestor counts
    "MemoryError": "oom",
    "OutOfMemoryError": "oom",
    "NonFiniteError": "non_finite",
    "FreezeError": "audit",
    "DataError": "data",
    "ValueError": "user_error",
    "InsufficientClusterResourcesError": "no_resources",
    "WorkerGroupStartupTimeoutError": "no_resources",
    "PreemptionError": "preempted",
    "RayActorError": "worker_lost",
    "WorkerHealthCheckFailedError": "worker_lost",
    "WorkerHealthCheckTimeoutError": "timeout",
    "NCCLHangError": "timeout",
}
_ALLOCATOR = "can't allocate memory"  # how PyTorch's allocator of a CPU says it, in a RuntimeError


def kind_of(error: BaseException) -> str:
    """The kind of an exception, by what it came of where that says more."""
    cause = getattr(error, "cause", None)  # around what another process raised, Ray puts its own
    error = cause if isinstance(cause, BaseException) else error
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in _ERRNOS:
            return _ERRNOS[each.errno]
    if _ALLOCATOR in str(error):
        return "oom"
    return next((_CLASSES[each.__name__] for each in type(error).__mro__ if each.__name__ in _CLASSES), "internal")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def again(kind: str, losses: int, *, restarts: int, kept: bool, begun: bool) -> bool:
    """Whether a trial that such a failure has ended for the `losses`th time is tried again: up to `restarts` times where it was `kept`
    and goes on from there, else once if no epoch of it had been heard."""
    allowed = restarts if kept else 0 if begun else 1
    return KINDS[kind].then == "again" and losses <= allowed


def stops(kind: str) -> bool:
    """Whether the search ends with such a failure, as no other trial would fare better."""
    return KINDS[kind].then == "stops"


def signature(failure: Failure) -> Failure:
    """A failure without what differs between trials that fail alike: words with digits in them."""
    kind, reason = failure
    return kind, re.sub(r"\w*\d\w*", "#", reason)


def alike(failures: Sequence[Failure]) -> bool:
    """Whether these are FEWEST or more, all with one signature."""
    return len(failures) >= FEWEST and all(signature(each) == signature(failures[0]) for each in failures)


def past_hope(
    tried: Sequence[tuple[str, Mapping[str, Any], Failure]], sizes: Mapping[str, Mapping[str, int | None]]
) -> bool:
    """Whether trials that failed `alike` (arm, proposed values, failure) show that no other will do better.

    `sizes` has of every arm that has trials left how many values each of its searched keys has, None where they have no end. In each
    of these arms every key must have failed at all of its values, or at VALUES of them: what one value causes, a learning rate
    or a depth, stops nothing. Neither does what `escapes`.
    """
    if not alike([failure for _, _, failure in tried]) or KINDS[tried[0][2][0]].escapes:
        return False
    for arm, keys in sizes.items():
        values = [values for name, values, _ in tried if name == arm]
        if not values:
            return False
        for key, size in keys.items():
            if len({repr(each[key]) for each in values}) < min(size or VALUES, VALUES):
                return False
    return True


def stop_text(kind: str, reason: str, failed: int, left: int) -> str:
    """Why a search ended early, and what to do."""
    said = f"all {failed} trials failed alike" if failed else "a trial could not go on"
    kept = "; what failed stays failed, a new name (name=NEW) begins afresh" if failed else ""
    return (
        f"the search was stopped: {said} ({kind}): {reason.rstrip('.')}. To go on, {KINDS[kind].remedy}, then give the same "
        f"command again for the {left} trials that are left{kept}"
    )
