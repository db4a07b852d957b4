"""What confirmations got wrong on test: a confusion matrix, and the samples they were most wrong about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from frostline import results
from frostline.images import decode, decode_grey
from frostline.samples import BadSample
from frostline.sources import Source, open_source
from frostline.spec import Data
from frostline.tokens import texts_of

WORST = 24
"""Samples shown."""
SIDE = 96
"""Of their pictures, in pixels."""
EXCERPT = 400
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Mistakes:
    """Over all of these trials: k trials on n samples of c classes."""

    counts: np.ndarray
    """(c, c): how often a sample of class i was taken for class j."""
    trials: int
    worst: list[dict[str, Any]]
    """Samples by how many trials got them wrong, then by how little these gave the true class: sample_id, label, predicted
    (most often), wrong (trials), likely (mean probability of the true class in those)."""


def read_mistakes(study: str | Path, trial_ids: Sequence[str], classes: int) -> Mistakes | None:
    """The mistakes of these trials together; None where they have no predictions."""
    counts, seen = np.zeros((classes, classes), np.int64), set()
    wrong: dict[str, list[tuple[int, int, float]]] = {}
    for rows in predictions_of(study, trial_ids):
        seen |= set(rows["trial_id"].to_pylist())
        label, predicted = np.asarray(rows["label"]), np.asarray(rows["predicted"])
        np.add.at(counts, (label, predicted), 1)
        likely = np.asarray(rows["probabilities"].combine_chunks().flatten()).reshape(len(rows), -1)
        for index in np.flatnonzero(label != predicted).tolist():
            said = int(label[index]), int(predicted[index]), float(likely[index, label[index]])
            wrong.setdefault(rows["sample_id"][index].as_py(), []).append(said)
    if not seen:
        return None
    worst = [
        {
            "sample_id": sample_id,
            "label": said[0][0],
            "predicted": Counter(each[1] for each in said).most_common(1)[0][0],
            "wrong": len(said),
            "likely": sum(each[2] for each in said) / len(said),
        }
        for sample_id, said in wrong.items()
    ]
    worst.sort(key=lambda each: (-each["wrong"], each["likely"], each["sample_id"]))
    return Mistakes(counts, len(seen), worst[:WORST])


def predictions_of(study: str | Path, trial_ids: Sequence[str]) -> Iterator[pa.Table]:
    """The predictions of these trials, some at a time."""
    for part in results.prediction_parts(study):
        chosen = pa.array([each in trial_ids for each in part["trial_id"].to_pylist()], pa.bool_())
        if (rows := part.filter(chosen).combine_chunks()).num_rows:
            yield rows


def confused(mistakes: Mistakes, most: int) -> list[int]:
    """At most so many classes, in their order: all, or those with most mistakes."""
    counts = mistakes.counts
    if len(counts) <= most:
        return list(range(len(counts)))
    off = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    return sorted(np.argsort(-off, kind="stable")[:most].tolist())


def excerpts(data: Mapping[str, Any], samples: Mapping[str, str]) -> dict[str, str]:
    """Sample id -> the beginning of its text, of those that `pictures` would find; nothing where the data holds images.

    Raises DataError and OSError where the data is not there any more.
    """
    spec = Data.model_validate(data)
    if spec.tokenizer is None:
        return {}
    found = {}
    for sample_id, raw in _contents(open_source(spec), samples):
        with suppress(BadSample):
            found[sample_id] = " / ".join(texts_of(raw, pair=spec.pair_column is not None))[:EXCERPT]
    return found


def pictures(data: Mapping[str, Any], samples: Mapping[str, str]) -> dict[str, bytes]:
    """Sample id -> a small PNG, of those of these samples (id -> class) that are where a job's `data` section says, and can
    be read; under another class, a sample is another one. Nothing where the data holds texts.

    Raises DataError and OSError where the data is not there any more.
    """
    spec = Data.model_validate(data)
    if spec.tokenizer is not None:
        return {}
    source, found = open_source(spec), {}
    for sample_id, raw in _contents(source, samples):
        try:
            if source.grey_shape:
                pixels = decode_grey(raw, source.grey_shape, size=SIDE, fit=spec.fit)
            else:
                pixels = decode(raw, size=SIDE, fit=spec.fit, max_pixels=int(spec.max_megapixels * 1e6))
        except BadSample:
            continue
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
        found[sample_id] = file.getvalue()
    return found


def _contents(source: Source, samples: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Id and raw content of those of these samples (id -> class) that are there and can be read."""
    at = [i for i, sample_id in enumerate(source.sample_ids) if samples.get(sample_id) == source.names[i]]
    for index, read in zip(at, source.read(at), strict=True):
        with suppress(BadSample):
            yield source.sample_ids[index], read()
