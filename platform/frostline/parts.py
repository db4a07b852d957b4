"""A part of a prediction: samples of a source, read, decoded and passed through a bundle, as rows. No Ray, and no output folder.

A sample that cannot be read or decoded is a row of its own table; nothing beside it is lost.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from frostline.bundle import Bundle
from frostline.features import EVAL_BATCH
from frostline.labels import labels_in, not_a_number
from frostline.metrics import losses_of_sets, probabilities, said_of
from frostline.pixels import Recipe, in_threads
from frostline.samples import BadSample
from frostline.sealed import VERSION
from frostline.sources import Reader, Source
from frostline.spec import Task

SCHEMA = b"1"
PART_BYTES = 32 << 20  # of inputs
MOST_IN_PART = 1024
MOST_IN_BATCH = 1024
UNREADABLE = pa.schema([("sample_id", pa.string()), ("reason", pa.string())], metadata={VERSION: SCHEMA})
"""Samples that have no prediction, and why."""


@dataclass(frozen=True, eq=False)
class Part:
    """What became of some samples."""

    predictions: pa.Table
    """A row each, of `schema_of`, in the order of the samples."""
    unreadable: pa.Table
    """A row each, of UNREADABLE."""


@dataclass(frozen=True, eq=False)
class Work:
    """Samples of a source that are to be predicted, in parts."""

    source: Source
    parts: list[Sequence[int]]
    recipe: Recipe
    features: bool
    batch: int | None
    """Images a pass; by memory when None."""

    def ids(self, part: int) -> list[str]:
        """Of its samples."""
        return [self.source.sample_ids[i] for i in self.parts[part]]

    def names(self, part: int) -> list[str | None]:
        """Of its samples' classes."""
        return [self.source.names[i] for i in self.parts[part]]


LABELS: dict[Task, pa.DataType] = {
    "classification": pa.string(),
    "multilabel": pa.list_(pa.string()),
    "regression": pa.float64(),
}
"""Task -> what a label is."""


def schema_of(classes: Sequence[str], *, features: bool, task: Task = "classification") -> pa.Schema:
    """The columns of predictions. `label` and `predicted` are a class, a list of labels or a number; `probabilities` are in the order of
    `classes` (none of a regression); `loss` is the label's negative log-likelihood in nats, of several labels the mean over
    them, of a number the squared error. It and `label` are null where the label is not known or no class of the bundle."""
    label, likely = LABELS[task], pa.list_(pa.float32(), len(classes))
    columns = [
        ("sample_id", pa.string()),
        ("label", label),
        ("predicted", label),
        *([("probabilities", likely)] if task != "regression" else []),
        ("loss", pa.float64()),
    ]
    kept = [("features", pa.list_(pa.float32()))] if features else []
    return pa.schema([*columns, *kept], metadata={VERSION: SCHEMA})


def label_in(bundle: Bundle, name: str | None) -> Any:
    """A sample's label, of its text in a source, as predictions have it; None where it is not known or no class of the bundle."""
    if name is None:
        return None
    if bundle.task == "regression":
        return None if not_a_number(name) else float(name)
    if bundle.task == "classification":
        return name if name in bundle.numbers else None
    labels = sorted({*labels_in(name, bundle.spec.data.label_separator)})
    return labels if bundle.numbers.keys() >= {*labels} else None


def parts_of(samples: Sequence[int], row_bytes: int) -> list[Sequence[int]]:
    """Consecutive samples, each an input of so many bytes: full batches of the usual size, as many as bytes allow."""
    fitting = PART_BYTES // (row_bytes * EVAL_BATCH) * EVAL_BATCH
    length = min(MOST_IN_PART, max(EVAL_BATCH, fitting))
    return [samples[start : start + length] for start in range(0, len(samples), length)]


def decoded(source: Source, samples: Sequence[int], recipe: Recipe) -> Generator[np.ndarray | BadSample]:
    """The input that the recipe makes of each of these samples (rising), or why there is none; in threads, a little ahead."""
    return in_threads(partial(_row, recipe=recipe), source.read(samples))


def _row(read: Reader, *, recipe: Recipe) -> np.ndarray | BadSample:
    try:
        return recipe.make(read())
    except BadSample as error:
        return error


def predict_part(
    bundle: Bundle,
    ids: Sequence[str],
    names: Sequence[str | None],
    inputs: Iterable[np.ndarray | BadSample],
    *,
    batch: int,
    features: bool,
) -> Part:
    """Rows for samples of these ids and classes, if known. `inputs` are taken a batch at a time."""
    bad: list[tuple[str, str]] = []
    good: list[int] = []
    held: list[np.ndarray] = []
    passed: list[tuple[np.ndarray, np.ndarray]] = []
    for number, row in enumerate(inputs):
        if isinstance(row, BadSample):
            bad.append((ids[number], str(row)))
            continue
        good.append(number)
        held.append(row)
        if len(held) == batch:
            passed += pass_fitting(bundle, np.stack(held))
            held = []
    if held:
        passed += pass_fitting(bundle, np.stack(held), fill=batch >= EVAL_BATCH)
    logits = np.concatenate([np.empty((0, len(bundle.classes)), np.float32), *(each for each, _ in passed)])
    labels = [label_in(bundle, names[number]) for number in good]
    rows = {
        "sample_id": [ids[number] for number in good],
        "label": labels,
        "predicted": said_of(logits, bundle.classes, bundle.task),
        "loss": _losses(bundle, logits, labels),
    }
    if bundle.task != "regression":
        likely = probabilities(logits, bundle.task)
        rows["probabilities"] = pa.FixedSizeListArray.from_arrays(likely.reshape(-1), len(bundle.classes))
    if features:
        rows["features"] = [row for _, given in passed for row in given.astype(np.float32)]
    return Part(
        pa.table(rows, schema=schema_of(bundle.classes, features=features, task=bundle.task)),
        pa.table({"sample_id": [what for what, _ in bad], "reason": [why for _, why in bad]}, schema=UNREADABLE),
    )


def pass_fitting(bundle: Bundle, inputs: np.ndarray, *, fill: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """What `Bundle.pass_through` gives, in halves where a GPU's memory does not hold the batch."""
    try:
        return [bundle.pass_through(inputs, fill=fill)]
    except torch.OutOfMemoryError:
        if len(inputs) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(inputs) // 2
    return [*pass_fitting(bundle, inputs[:middle]), *pass_fitting(bundle, inputs[middle:])]


def batch_of(bundle: Bundle, recipe: Recipe) -> int:
    """How many samples a pass takes: on a GPU as many as half of its free memory holds, as one pass has shown, else EVAL_BATCH."""
    if bundle.device.type != "cuda":
        return EVAL_BATCH
    torch.cuda.reset_peak_memory_stats(bundle.device)
    before = torch.cuda.memory_allocated(bundle.device)
    pass_fitting(bundle, np.zeros((EVAL_BATCH, *recipe.shape), recipe.dtype))
    taken = torch.cuda.max_memory_allocated(bundle.device) - before
    free, _ = torch.cuda.mem_get_info(bundle.device)
    return fitting_batch(taken / EVAL_BATCH, free)


def fitting_batch(image_bytes: float, free_bytes: float) -> int:
    """The largest power of 2, at most MOST_IN_BATCH, whose images take at most half of what is free; at least 1."""
    batch = MOST_IN_BATCH
    while batch > 1 and batch * image_bytes > free_bytes / 2:
        batch //= 2
    return batch


def _losses(bundle: Bundle, logits: np.ndarray, labels: Sequence[Any]) -> list[float | None]:
    known = [row for row, label in enumerate(labels) if label is not None]
    wide = logits[known].astype(np.float64)
    losses: list[float | None] = [None] * len(labels)
    if bundle.task == "regression":
        found = np.square(wide[:, 0] - [labels[row] for row in known])
    elif bundle.task == "multilabel":
        found = losses_of_sets(wide, indicators(bundle, [labels[row] for row in known]))
    else:
        own = np.array([bundle.numbers[labels[row]] for row in known], np.int64)
        top = wide.max(axis=1, initial=-np.inf)
        whole = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
        found = whole - wide[np.arange(len(known)), own]
    for row, loss in zip(known, found.tolist(), strict=True):
        losses[row] = loss
    return losses


def indicators(bundle: Bundle, labels: Sequence[Iterable[str]]) -> np.ndarray:
    """(N, C) bool: which of the classes each sample has."""
    found = np.zeros((len(labels), len(bundle.classes)), bool)
    for row, names in zip(found, labels, strict=True):
        row[[bundle.numbers[name] for name in names]] = True
    return found
