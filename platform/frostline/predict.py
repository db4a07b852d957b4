"""A bundle's predictions for all images of a folder, a Parquet file or whatever `sources` reads, as Parquet that survives a kill.

Samples go in parts, in their order. A part is committed as a whole: its rows of `predictions` with those of `unreadable`. The
same command again goes on with the parts that are missing, if bundle and data are what they were.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from frostline.bundle import Bundle, load_bundle
from frostline.commit import (
    DamagedFile,
    Lease,
    clean,
    commit_part,
    committed_parts,
    local_folder,
    read_table,
    write_file,
)
from frostline.data import load_data, recipe_of
from frostline.files import DataError
from frostline.jobfile import parse_job
from frostline.metrics import scores_of, scores_of_numbers, scores_of_sets
from frostline.models import digest
from frostline.parts import (
    UNREADABLE,
    Part,
    Work,
    batch_of,
    decoded,
    indicators,
    label_in,
    parts_of,
    predict_part,
    schema_of,
)
from frostline.progress import Progress
from frostline.progress import duration as clock
from frostline.sources import Source, open_source
from frostline.spec import Data, Metric

Split = Literal["train", "val", "test"]

RECORD = "predictions"
RAY_SECONDS = 60.0
OWN = {  # keys of `data` that need not be those of training
    "image": ("image_column", "label_column", "label_separator", "max_megapixels"),
    "text": ("text_column", "pair_column", "label_column", "label_separator"),
}


class PredictError(RuntimeError):
    """A prediction that ran to its end and has nothing to show for it."""


@dataclass(frozen=True)
class Summary:
    """What a prediction came to."""

    folder: Path
    samples: int
    predicted: int
    unreadable: int
    labelled: int
    """Of those predicted."""
    foreign: dict[str, int]
    """Labels that the bundle does not know, and how many samples have them."""
    scores: dict[Metric, float]
    """Of those labelled; empty where none is."""
    reasons: dict[str, int]
    """Kinds of unreadable samples."""


def predict_data(
    bundle: str | Path,
    data: str,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    split: Split | None = None,
    features: bool = False,
    batch: int | None = None,
    address: str | None = None,
    allow_open_cluster: bool = False,
    console: Console | None = None,
) -> Summary:
    """Predict all samples at `data`, a local path or a URI, or those of one split, into the folder `out`; or go on with that.

    `overrides` are `data.KEY=VALUE` for how the data is read; `features` keeps what the head is given. Small inputs are predicted in
    this process, others on a local Ray, or at `address` on a cluster, as in `frostline.search`.

    Raises a ValueError where the bundle, the data or `out` cannot be used, PredictError where no sample could be read.
    """
    loaded = load_bundle(bundle)
    spec = _data(loaded, data, overrides)
    source = open_source(spec, labelled=False)
    samples = range(len(source.sample_ids)) if split is None else _in_split(loaded, spec, source, split)
    if not samples:
        raise DataError(f"{source.name} holds no {loaded.inputs.noun}s" + (f" in {split}" if split else ""))
    recipe = recipe_of(spec, source, loaded.tokenizer)
    row_bytes = math.prod(recipe.shape) * recipe.dtype.itemsize
    work = Work(source, parts_of(samples, row_bytes), recipe, features, batch)
    folder = local_folder(out)
    with Lease.take(folder, {"predicts": source.name}), Progress(console or Console(stderr=True)) as progress:
        _claim(folder, loaded, work)
        clean(folder)
        done = set(committed_parts(folder, RECORD))
        todo = [number for number in range(len(work.parts)) if number not in done]
        tell = _telling(progress, work, done)

        def keep(number: int, part: Part) -> None:
            commit_part(folder, {"unreadable": part.unreadable, RECORD: part.predictions}, number)
            tell(number)

        if address is None:
            todo = _here(loaded, work, todo, keep, progress)
        if todo:
            from frostline.pool import predict_on_ray

            predict_on_ray(Path(bundle), loaded, work, todo, keep, address=address, allow_open=allow_open_cluster)
        summary = _summary(folder, loaded, work)
    if not summary.predicted:
        raise PredictError(f"none of {summary.samples:,} samples could be read; {folder / 'unreadable.csv'} says why")
    return summary


def worth_ray(left: int, images_per_s: float, places: int) -> bool:
    """Whether so many images are better predicted by a local Ray, on so many places at once, than in this process."""
    return places > 1 and left / images_per_s > RAY_SECONDS


def places_here(bundle: Bundle) -> int:
    """How many passes this machine holds at once."""
    if bundle.device.type == "cuda":
        return torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // bundle.threads) if bundle.device.type == "cpu" else 1


def _here(
    bundle: Bundle, work: Work, todo: list[int], keep: Callable[[int, Part], None], progress: Progress
) -> list[int]:
    """Predict parts in this process, until it shows that Ray would pay; answers those that are left."""
    if not todo:
        return []
    batch, places = work.batch or batch_of(bundle, work.recipe), places_here(bundle)
    ahead = decoded(work.source, list(chain.from_iterable(work.parts[number] for number in todo)), work.recipe)
    with contextlib.closing(ahead):
        started, passed = time.monotonic(), 0
        for at, number in enumerate(todo):
            ids, names = work.ids(number), work.names(number)
            images = islice(ahead, len(ids))
            keep(number, predict_part(bundle, ids, names, images, batch=batch, features=work.features))
            passed += len(ids)
            rest = todo[at + 1 :]
            left = sum(len(work.parts[other]) for other in rest)
            if worth_ray(left, passed / (time.monotonic() - started), places):
                progress.tell(f"{left:,} samples are left: starting Ray")
                return rest
    return []


def _data(bundle: Bundle, path: str, overrides: Sequence[str]) -> Data:
    """The bundle's own data section, at another path. Raises ValueError for keys that must be those of training."""
    for override in overrides:
        key = override.partition("=")[0].strip().removeprefix("data.")
        if key not in (own := OWN[bundle.inputs.noun]):
            raise ValueError(
                f"{override!r}: of the data section a prediction takes {', '.join(f'data.{each}' for each in own)}; the rest is "
                "the bundle's"
            )
    base = bundle.spec.data.model_dump(mode="json", exclude={"group_column", "per_class"})
    known = {key: value for key, value in base.items() if value is not None}
    raw = {"name": "predict", "data": {**known, "path": path}, "backbone": {"name": bundle.spec.backbone.name}}
    return parse_job(raw, overrides, source="predict").data


def _in_split(bundle: Bundle, spec: Data, source: Source, split: Split) -> Sequence[int]:
    """The samples of a split: as the data comes with it, or as the bundle's trial had it, of the trial's own data."""
    if source.splits is not None and split in source.splits:
        return [i for i, name in enumerate(source.splits) if name == split]
    own = bundle.spec.data.model_copy(update={"path": spec.path})
    try:
        dataset = load_data(own, bundle.spec.seeds.split)
    except DataError as error:
        raise DataError(f"{source.name} comes without {split}, and is no data of the bundle's: {error}") from error
    if dataset.data_hash != bundle.about["data_hash"]:
        raise DataError(
            f"{source.name} comes without {split}, and is not the data that the bundle was trained on (that has "
            f"{bundle.about['data_hash']}, this {dataset.data_hash}), whose split is known; leave --split out"
        )
    chosen = {dataset.sample_ids[i] for i in dataset.indices(split)}
    return [i for i, sample_id in enumerate(source.sample_ids) if sample_id in chosen]


def _claim(folder: Path, bundle: Bundle, work: Work) -> None:
    """Write down what is predicted, or check that it is what was begun. Raises ValueError."""
    source = work.source
    about: dict[str, Any] = {
        "format": 1,
        "bundle": bundle.id,
        "trial": bundle.spec.trial_id,
        "classes": list(bundle.classes),
        "data": source.name,
        "samples": sum(map(len, work.parts)),
        "part": len(work.parts[0]),
        "features": work.features,
        "listing": digest([[*work.ids(number), *work.names(number)] for number in range(len(work.parts))]),
        "stamp": source.stamp,
    }
    path = folder / "predict.json"
    if path.is_file():
        try:
            before = json.loads(path.read_bytes())
        except ValueError as error:
            told = f"{path} is not what was written ({error}). Put it back from a copy, or give another --out"
            raise DamagedFile(told) from None
        if changed := [key for key in about if before.get(key) != about[key]]:
            what = "; ".join(f"{key} was {before.get(key)!r}, now {about[key]!r}" for key in changed[:3])
            raise ValueError(f"{folder} holds predictions of something else ({what}); give another --out")
        return
    if any(entry.name != "lease.json" and not entry.name.startswith(".tmp-") for entry in folder.iterdir()):
        raise ValueError(f"{folder} holds other files, and no predictions; give a new or empty folder as --out")
    write_file(path, (json.dumps(about, indent=2) + "\n").encode())


def _telling(progress: Progress, work: Work, done: set[int]) -> Callable[[int], None]:
    """What shows how far it is, given the number of each part as it ends."""
    total = sum(map(len, work.parts))
    before = sum(len(work.parts[number]) for number in done)
    started, passed = time.monotonic(), 0

    def tell(number: int) -> None:
        nonlocal passed
        passed += len(work.parts[number])
        rate = passed / (time.monotonic() - started)
        left = clock((total - before - passed) / rate)
        progress.tell(f"{before + passed:,} of {total:,} samples predicted, {rate:,.0f} a second, about {left} left")

    return tell


def _summary(folder: Path, bundle: Bundle, work: Work) -> Summary:
    """Count and score what is committed, a part at a time, and write summary.json, and unreadable.csv if anything is."""
    schema = schema_of(bundle.classes, features=work.features, task=bundle.task)
    counted, labels, predicted, losses = 0, [], [], []
    bad: list[tuple[str, str]] = []
    for part in committed_parts(folder, RECORD):
        rows = read_table(folder, RECORD, RECORD, schema, [part])
        lost = read_table(folder, "unreadable", RECORD, UNREADABLE, [part]).to_pydict()
        bad += zip(lost["sample_id"], lost["reason"], strict=True)
        counted += len(rows)
        known = rows.filter(rows["label"].is_valid())
        labels.append(_countable(known["label"].to_pylist(), bundle))
        predicted.append(_countable(known["predicted"].to_pylist(), bundle))
        losses.append(known["loss"].to_numpy())
    truth = np.concatenate(labels)
    names = chain.from_iterable(work.names(number) for number in range(len(work.parts)))
    unknown = (name for name in names if name is not None and label_in(bundle, name) is None)
    summary = Summary(
        folder=folder,
        samples=sum(map(len, work.parts)),
        predicted=counted,
        unreadable=len(bad),
        labelled=len(truth),
        foreign=dict(Counter(unknown).most_common(20)),
        scores=_scored(bundle, truth, np.concatenate(predicted), np.concatenate(losses)) if len(truth) else {},
        reasons=dict(Counter(reason.partition(":")[0] for _, reason in bad).most_common()),
    )
    told = {name: value for name, value in vars(summary).items() if name != "folder"}
    if bad:
        write_file(folder / "unreadable.csv", _as_csv(bad))
    write_file(folder / "summary.json", (json.dumps(told, indent=2) + "\n").encode())
    return summary


def _countable(labels: Sequence[Any], bundle: Bundle) -> np.ndarray:
    """Labels of samples, as predictions have them, as `metrics` takes them."""
    if bundle.task == "regression":
        return np.array(labels, np.float64)
    if bundle.task == "multilabel":
        return indicators(bundle, labels)
    return np.array([bundle.numbers[name] for name in labels], np.int64)


def _scored(bundle: Bundle, truth: np.ndarray, predicted: np.ndarray, losses: np.ndarray) -> dict[Metric, float]:
    if bundle.task == "regression":
        return scores_of_numbers(truth, predicted)
    if bundle.task == "multilabel":
        return scores_of_sets(truth, predicted, losses)
    return scores_of(truth, predicted, losses, len(bundle.classes))


def _as_csv(bad: Iterable[tuple[str, str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("sample_id", "reason"), *bad])
    return text.getvalue().encode()


def lines(summary: Summary) -> Iterator[str]:
    """A summary for people."""
    yield f"{summary.predicted:,} of {summary.samples:,} samples predicted: {summary.folder / RECORD}"
    if summary.unreadable:
        kinds = ", ".join(f"{count:,} x {kind}" for kind, count in summary.reasons.items())
        yield f"{summary.unreadable:,} could not be read ({kinds}): {summary.folder / 'unreadable.csv'}"
    if summary.foreign:
        name, count = next(iter(summary.foreign.items()))
        others = len(summary.foreign) - 1
        more = f" and {others} other{'s' * (others > 1)}" if others else ""
        yield f"no classes of this bundle, so not scored: {name!r} ({count:,} samples){more}"
    if summary.scores:
        scores = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in summary.scores.items())
        yield f"on {summary.labelled:,} labelled samples: {scores}"
