"""Which samples train, validate and test: seeded, stratified by class, never cutting through a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from frostline.files import DataError

SPLITS = ("train", "val", "test")


def split(
    labels: np.ndarray,
    groups: np.ndarray | None,
    *,
    val: float,
    test: float,
    seed: int,
    classes: Sequence[str] | None = None,
) -> np.ndarray:
    """Assign samples to "train", "val" and "test": an (N,) array of these names.

    `labels` (N,) and `groups` (N,) are integers, or `labels` (N, C) of 0 and 1 where a sample may have any number of classes: the
    shares of each, and of all samples, are then held as well as can be (as Sechidis et al. 2011 do). `val` and `test` are shares of
    these N samples; a share of 0 leaves that split out, so val can be carved out of a given train split by passing its samples with
    test = 0. `classes` names the labels in errors.

    Every class is in every split. Without groups the counts of a class are within one of its shares (further off only
    where a share is below one sample, as each split gets at least one), and the errors of the classes cancel out over
    the whole. With groups, large ones are placed first, each where the most samples are still wanted.

    Raises DataError when a class has fewer groups (samples, without groups) than there are splits, or when groups that
    hold several classes leave a class out of a split.
    """
    assert min(val, test) >= 0, (val, test)
    assert val + test < 1, (val, test)
    wanted = [name for name, share in zip(SPLITS, (1, val, test), strict=True) if share > 0]
    shares = [share for share in (1 - val - test, val, test) if share > 0]

    def name(label: int) -> str:
        return repr(classes[label]) if classes is not None else str(label)

    numbers = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    held = _held(labels)
    units = _units(held, numbers)
    left = Counter(label for unit in units for label in unit)  # class -> units not placed yet
    for label in sorted(left):
        if left[label] < len(wanted):
            samples = sum(label in each for each in held)
            counted = f"{samples} sample(s)" + (f" in {left[label]} group(s)" if left[label] != samples else "")
            raise DataError(
                f"class {name(label)} has {counted}, fewer than the {len(wanted)} splits to fill ({', '.join(wanted)}): "
                f"add samples, drop the class, or bring your own splits"
            )

    # Keys drawn as plain floats: their stream is the same on every platform and release of NumPy.
    order = np.argsort(np.random.default_rng(seed).random(len(units)), kind="stable")
    order = sorted(order.tolist(), key=lambda unit: -sum(units[unit].values()))
    counts = Counter(label for each in held for label in each)
    room = _quotas(counts, shares)  # class -> samples still wanted, one number a split
    lacking = {label: set(range(len(wanted))) for label in counts}  # class -> splits that have none of it yet
    weights = (
        [1.0] * len(shares) if labels.ndim == 1 else shares
    )  # of several classes, those with many go into every split
    placed = np.empty(len(units), np.int64)
    for unit in order:
        own = units[unit]
        # As soon as a class has only as many units left as splits without it, each of these splits must get one.
        urgent = [lacking[label] for label in own if lacking[label] and left[label] <= len(lacking[label])]
        among = set.intersection(*urgent) or set.union(*urgent) if urgent else range(len(wanted))
        into = max(
            sorted(among),
            key=lambda s: sum(room[label][s] / weights[s] * n / counts[label] for label, n in sorted(own.items())),
        )
        placed[unit] = into
        for label, n in own.items():
            room[label][into] -= n
            left[label] -= 1
            lacking[label].discard(into)
    for label, splits in sorted(lacking.items()):
        if splits:
            raise DataError(
                f"class {name(label)} cannot be in {' and '.join(wanted[s] for s in sorted(splits))}: the groups that "
                f"hold it hold other classes too; add groups, drop the class, or bring your own splits"
            )
    return np.array(wanted, dtype="<U5")[placed[numbers]]


def joined(*keys: np.ndarray) -> np.ndarray:
    """Group numbers (N,): samples that share a value in any of the `keys`, each (N,), directly or through others, share one."""
    n = len(keys[0])
    rows, columns, base = [], [], n
    for key in keys:
        values, inverse = np.unique(key, return_inverse=True)
        rows.append(np.arange(n))
        columns.append(base + inverse)
        base += len(values)
    row, column = np.concatenate(rows), np.concatenate(columns)
    links = coo_matrix((np.ones(len(row), np.int8), (row, column)), shape=(base, base))
    return connected_components(links, directed=False)[1][:n].astype(np.int64)


def occurring(labels: np.ndarray) -> list[int]:
    """The classes that occur in (N,) labels or, any number a sample, in (N, C) of 0 and 1."""
    return np.unique(labels).tolist() if labels.ndim == 1 else np.flatnonzero(labels.any(axis=0)).tolist()


def _held(labels: np.ndarray) -> list[list[int]]:
    """The classes of each sample; of several a further one that all have, so that splits are of the right size."""
    if labels.ndim == 1:
        return [[label] for label in labels.tolist()]
    return [[*np.flatnonzero(row).tolist(), labels.shape[1]] for row in labels]


def _units(held: Sequence[Sequence[int]], numbers: np.ndarray) -> list[dict[int, int]]:
    """For every group, numbered from 0: class -> samples."""
    units: list[dict[int, int]] = [{} for _ in range(int(numbers.max()) + 1)]
    for unit, classes in zip(numbers.tolist(), held, strict=True):
        for label in classes:
            units[unit][label] = units[unit].get(label, 0) + 1
    return units


def _quotas(counts: Counter[int], shares: Sequence[float]) -> dict[int, list[int]]:
    """Class -> whole samples a split. They sum to the class; each is its share rounded up or down, so that what earlier
    classes rounded away is made up for."""
    owed = [0.0] * len(shares)
    quotas = {}
    for label in sorted(counts):
        exact = [share * counts[label] for share in shares]
        given = [int(want) for want in exact]
        gains = sorted(range(len(shares)), key=lambda s: (-(owed[s] + exact[s] - given[s]), s))
        for s in gains[: counts[label] - sum(given)]:
            given[s] += 1
        owed = [debt + want - got for debt, want, got in zip(owed, exact, given, strict=True)]
        quotas[label] = given
    return quotas
