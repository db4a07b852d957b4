"""From `spec.Data` to what a trial trains on: inputs, labels, splits, and the hashes that say which they were."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import PIL
import pyarrow as pa

from frostline.files import DataError
from frostline.images import DECODE_VERSION, decode, decode_grey
from frostline.labels import labels_in, not_a_number
from frostline.pixels import BYTES, Recipe, content_hashes, load_rows
from frostline.shown import Shown
from frostline.sources import Source, open_source
from frostline.spec import Data, Task
from frostline.splits import SPLITS, joined, occurring, split
from frostline.targets import Target
from frostline.tokens import Tokenizer, key_of_rows, load_tokenizer, to_ids

__all__ = ["DataError", "Dataset", "at_most", "load_data", "splits_table", "subset"]

_LISTED = 10  # problems that an error spells out
_KEPT = 4  # datasets that a process holds on to
_EMPTY = hashlib.sha256(b"").hexdigest()

_loaded: dict[tuple[Data, int], Dataset] = {}


@dataclass(frozen=True, eq=False)
class Dataset:
    """N samples in the order of their source; arrays run parallel."""

    inputs: np.ndarray | Shown
    """(N, size, size, 3) uint8 RGB, or (N, size, 2) int32 ids and types of tokens; mapped read-only from the node's cache, or made anew
    whenever they are shown."""
    labels: np.ndarray
    """(N,) int64: indices into `classes`. Of several labels (N, C) float32 of 0 and 1, of a regression (N, 1) float64."""
    names: tuple[str, ...]
    """The label of each sample as text, as its source has it."""
    sample_ids: tuple[str, ...]
    classes: tuple[str, ...]
    """What is told apart; of several labels these, of a regression the name of the column."""
    split: np.ndarray
    """(N,) of "train", "val" and "test"."""
    groups: tuple[str, ...] | None
    excluded: tuple[tuple[str, str], ...]
    """(sample id or folder, `kind: detail`) for all that was left out."""
    data_hash: str
    """16 hex digits over sample id, class and raw content of every sample, in order; the same for every size and tokenizer."""
    split_hash: str
    """16 hex digits over sample id, class, group and split of every sample, and over what was excluded."""
    inputs_hash: str
    """16 hex digits over everything that could change `inputs`: contents, size, fit or tokenizer, versions."""
    target: Target
    """How training counts the labels."""

    @property
    def size(self) -> int:
        """Of an input: the side in pixels, or the length in tokens."""
        return self.inputs.shape[1]

    def indices(self, split: str) -> np.ndarray:
        """The samples of a split, sorted, int64."""
        assert split in SPLITS, split
        return np.flatnonzero(self.split == split).astype(np.int64)

    def targets(self, samples: np.ndarray) -> np.ndarray:
        """What a network is trained to give for these samples: (n,) int64, (n, C) float32 of 0 and 1, or (n, 1) float32 standardised."""
        labels = self.labels[samples]
        return self.target.standardised(labels) if self.target.task == "regression" else labels


def load_data(spec: Data, split_seed: int, *, progress: Callable[[int, int], None] | None = None) -> Dataset:
    """The dataset of a job, decoded or tokenised at `spec.size` and split by `split_seed`.

    A process that asks again with equal arguments is given the same object without another look at the files; other
    processes of the node share the inputs. `progress(done, total)` is called while these are made.

    Raises DataError when the data cannot be used, or, unless `spec.on_bad` is "exclude", when some of it cannot.
    """
    key = (spec, split_seed)
    if key not in _loaded:
        dataset = _load(spec, split_seed, progress)
        while len(_loaded) >= _KEPT:
            _loaded.pop(next(iter(_loaded)))
        _loaded[key] = dataset
    return _loaded[key]


def subset(dataset: Dataset, per_class: int | None, seed: int) -> np.ndarray:
    """Train samples, sorted, int64: all of them, or `per_class` of each class drawn by `seed`. With the same seed, a
    smaller draw is part of a larger one.

    Raises DataError when a class has fewer.
    """
    train = dataset.indices("train")
    if per_class is None:
        return train
    assert dataset.target.task == "classification", "others are refused with the job"
    labels = dataset.labels[train]
    for label, name in enumerate(dataset.classes):
        if (count := int(np.sum(labels == label))) < per_class:
            raise DataError(
                f"data.per_class = {per_class}, but class {name!r} has {count} samples in train: lower it to "
                f"{min(Counter(labels.tolist()).values())} or below, or add samples"
            )
    return at_most(dataset, per_class, seed)


def at_most(dataset: Dataset, per_class: int, seed: int) -> np.ndarray:
    """Train samples, sorted, int64: `per_class` of each class drawn by `seed`, or all that a class has. Part of `subset`
    with the same seed, where that draws as many or more. Where a sample has no one class, as many in all."""
    train = dataset.indices("train")
    labels = dataset.labels[train]
    drawn = np.argsort(np.random.default_rng(seed).random(len(train)), kind="stable")
    if dataset.target.task != "classification":
        return train[np.sort(drawn[: per_class * len(dataset.classes)])]
    chosen = [drawn[labels[drawn] == label][:per_class] for label in range(len(dataset.classes))]
    return train[np.sort(np.concatenate(chosen))]


def splits_table(dataset: Dataset) -> pa.Table:
    """One row a sample (sample_id, label, group_id, split, reason), then one for all that was excluded (split "excluded", with
    its reason). `dataset.split_hash` stands for it."""
    out = len(dataset.excluded)
    return pa.table(
        {
            "sample_id": [*dataset.sample_ids, *(what for what, _ in dataset.excluded)],
            "label": [*dataset.names, *[None] * out],
            "group_id": [*(dataset.groups or [None] * len(dataset.labels)), *[None] * out],
            "split": [*dataset.split.tolist(), *["excluded"] * out],
            "reason": [*[None] * len(dataset.labels), *(reason for _, reason in dataset.excluded)],
        },
        schema=pa.schema([(name, pa.string()) for name in ("sample_id", "label", "group_id", "split", "reason")]),
    )


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """The label map: whole numbers first, by value, then all other names as plain strings."""

    def place(name: str) -> tuple[int, int, str]:
        number = re.fullmatch(r"-?[0-9]{1,18}", name)
        return (0, int(name), name) if number else (1, 0, name)

    return tuple(sorted(set(names), key=place))


def _load(spec: Data, split_seed: int, progress: Callable[[int, int], None] | None) -> Dataset:
    source = open_source(spec)
    problems = list(source.problems)

    def usable(indices: np.ndarray, reasons: dict[int, str]) -> np.ndarray:
        problems.extend((source.sample_ids[indices[i]], reason) for i, reason in reasons.items())
        return np.delete(indices, list(reasons))

    hashes, unreadable = content_hashes(source)
    if spec.task == "regression":
        unreadable |= {
            i: why for i, name in enumerate(source.names) if name is not None and (why := not_a_number(name))
        }
    kept = usable(np.arange(len(source.sample_ids)), unreadable)
    contents = np.array([row.tobytes().hex() for row in hashes])
    kept = usable(kept, _crossing(source, kept, contents))
    if spec.decoded == "anew" and not source.separate:
        raise DataError(
            f'data.decoded = "anew" reads samples in any order, and {source.name} keeps many in a file: leave it out, or write each image '
            "into a file of its own, in a folder"
        )
    recipe = recipe_of(spec, source)
    made = load_rows(source, kept, hashes, recipe, progress, keep=spec.decoded == "kept")
    kept = usable(kept, made.bad)
    inputs = Shown(source, kept, hashes[kept], recipe) if made.rows is None else made.rows
    if problems and spec.on_bad == "error":
        raise DataError(_listing(source.name, problems))

    names = [name for i in kept if (name := source.names[i]) is not None]  # labelled: all have one
    classes, labels = labels_of(spec, source, names, _after(problems))
    groups = None if source.groups is None else tuple(source.groups[i] for i in kept)
    keys = [contents[kept]] if groups is None else [contents[kept], np.array(groups)]
    assigned = _assign(spec, source, kept, labels, joined(*keys), classes, split_seed, _after(problems))
    sample_ids = tuple(source.sample_ids[i] for i in kept)
    rows = zip(sample_ids, names, groups or [None] * len(names), assigned.tolist(), strict=True)
    return Dataset(
        inputs=inputs,
        labels=labels,
        names=tuple(names),
        sample_ids=sample_ids,
        classes=classes,
        split=assigned,
        groups=groups,
        excluded=tuple(problems),
        data_hash=_hash_rows(zip(sample_ids, names, contents[kept].tolist(), strict=True)),
        split_hash=_hash_rows([*rows, *((what, None, None, "excluded") for what, _ in problems)]),
        inputs_hash=made.key,
        target=target_of(spec.task, labels[assigned == "train"]),
    )


def labels_of(spec: Data, source: Source, names: Sequence[str], after: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes, and `Dataset.labels` of samples of these names. Raises DataError."""
    if spec.task == "regression":
        labels = np.array([float(name) for name in names])[:, None]
        if len(np.unique(labels)) < 2:
            raise DataError(
                f"{source.name}: all labels are {names[0] if names else 'missing'}; nothing can be learnt{after}"
            )
        return (spec.label_column,), labels
    if spec.task == "multilabel":
        sets = [labels_in(name, spec.label_separator) for name in names]
        classes = order_classes(name for each in sets for name in each)
        if not classes:
            raise DataError(f"{source.name}: no sample has any label in column {spec.label_column!r}{after}")
        numbers = {name: label for label, name in enumerate(classes)}
        labels = np.zeros((len(names), len(classes)), np.float32)
        for row, each in zip(labels, sets, strict=True):
            row[[numbers[name] for name in each]] = 1
        return classes, labels
    present = set(names)
    classes = tuple(c for c in source.classes if c in present) if source.classes else order_classes(present)
    if len(classes) < 2:
        left = f"only samples of class {classes[0]!r}" if classes else "no samples"
        raise DataError(f"{source.name} has {left}; at least two classes are needed{after}")
    numbers = {name: label for label, name in enumerate(classes)}
    return classes, np.array([numbers[name] for name in names], np.int64)


def target_of(task: Task, train: np.ndarray) -> Target:
    """How training counts its labels, (n, …)."""
    if task != "regression":
        return Target(task)
    return Target(task, float(train.mean()), float(train.std()) or 1.0)


def recipe_of(spec: Data, source: Source | None, tokenizer: Tokenizer | None = None) -> Recipe:
    """How the samples of a source become inputs, or encoded images and texts from anywhere; texts by this tokenizer, or that
    which `spec` names."""
    size = spec.size
    assert size is not None, "settle the size before loading"
    if spec.tokenizer is not None:
        tokenizer, pair = tokenizer or load_tokenizer(spec.tokenizer), spec.pair_column is not None
        make = to_ids(tokenizer, size, pair=pair)
        return Recipe("tokens", key_of_rows(tokenizer, size, pair=pair), (size, 2), np.dtype(np.int32), make)
    fit, max_pixels, grey = spec.fit, int(spec.max_megapixels * 1_000_000), source and source.grey_shape
    if grey is not None:
        make: Callable[[bytes], np.ndarray] = partial(decode_grey, shape=grey, size=size, fit=fit)
    else:
        make = partial(decode, size=size, fit=fit, max_pixels=max_pixels)
    key = [DECODE_VERSION, PIL.__version__, grey, size, fit, max_pixels]
    return Recipe("pixels", key, (size, size, 3), BYTES, make)


def _crossing(source: Source, kept: np.ndarray, contents: np.ndarray) -> dict[int, str]:
    """Where the data comes with splits: position in `kept` -> why that sample leaks. Of samples with the same content or
    group in several splits, test keeps its own, then val."""
    if source.splits is None:
        return {}
    splits = [source.splits[i] for i in kept]
    keys = {"duplicate": contents[kept].tolist()}
    if source.groups is not None:
        keys["shared group"] = [source.groups[i] for i in kept]
    leaks: dict[int, str] = {}
    for kind, values in keys.items():
        first: dict[tuple[str, str], int] = {}  # (value, split) -> position
        for position, (value, name) in enumerate(zip(values, splits, strict=True)):
            if position not in leaks:
                first.setdefault((value, name), position)
        for position, (value, name) in enumerate(zip(values, splits, strict=True)):
            if value == _EMPTY or position in leaks:
                continue
            other = next(
                (first[value, s] for s in reversed(SPLITS[SPLITS.index(name) + 1 :]) if (value, s) in first), None
            )
            if other is None:
                continue
            twin = f"{source.sample_ids[kept[other]]} in {splits[other]}"
            if kind == "duplicate":
                differs = source.names[kept[other]] != source.names[kept[position]]
                leaks[position] = f"duplicate: same content as {twin}" + (", under another label" if differs else "")
            else:
                leaks[position] = f"shared group: {value!r} as {twin}"
    return leaks


def _assign(
    spec: Data,
    source: Source,
    kept: np.ndarray,
    labels: np.ndarray,
    units: np.ndarray,
    classes: Sequence[str],
    seed: int,
    after: str,
) -> np.ndarray:
    """The split of every kept sample: as given, with what is not given carved out of train, or out of all."""
    if spec.task == "regression":
        labels = np.zeros(len(kept), np.int64)  # splits are drawn from all alike
    if source.splits is None:
        return split(labels, units, val=spec.val, test=spec.test, seed=seed, classes=classes)
    assigned = np.array([source.splits[i] for i in kept], dtype="<U5")
    in_train = assigned == "train"
    given = set(source.splits)
    for name in given:
        if not np.any(assigned == name):
            raise DataError(f"{source.name} has no samples left in {name}{after}")
    if "train" not in given:
        raise DataError(f"{source.name} comes with {' and '.join(sorted(given))} but no train split")
    for name in SPLITS[1:]:
        if strays := set(occurring(labels[assigned == name])) - set(occurring(labels[in_train])):
            listed = ", ".join(repr(classes[label]) for label in sorted(strays))
            raise DataError(f"{source.name}: class(es) {listed} in {name}, but not in train{after}")
    val, test = (0.0 if name in given else share for name, share in (("val", spec.val), ("test", spec.test)))
    if val or test:
        assigned[in_train] = split(labels[in_train], units[in_train], val=val, test=test, seed=seed, classes=classes)
    return assigned


def _listing(name: str, problems: Sequence[tuple[str, str]]) -> str:
    kinds = Counter(reason.split(":")[0] for _, reason in problems)
    lines = [
        f"{len(problems)} problem(s) in {name} ({', '.join(f'{count} x {kind}' for kind, count in kinds.most_common())}):",
        *(f"  {what}: {reason}" for what, reason in problems[:_LISTED]),
    ]
    if len(problems) > _LISTED:
        lines.append(f"  and {len(problems) - _LISTED} more")
    return "\n".join([*lines, 'Mend them, or set data.on_bad = "exclude" to leave them out, counted and listed.'])


def _after(problems: Sequence[tuple[str, str]]) -> str:
    return f", after {len(problems)} exclusion(s), such as {': '.join(problems[0])}" if problems else ""


def _hash_rows(rows: Iterable[Sequence[str | None]]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row).encode() + b"\n")
    return total.hexdigest()[:16]
