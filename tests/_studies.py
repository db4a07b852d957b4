"""Studies as a search leaves them, written without training: for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from frostline.commit import commit_part, write_file
from frostline.jobfile import parse_job
from frostline.results import RECORD, table_of, write_splits
from frostline.study import Study

RATES = {
    "train.lr": {"low": 1e-5, "high": 1e-2, "log": True},
    "train.head_lr": {"low": 1e-3, "high": 1e-1, "log": True},
}
SPACES = {
    "freeze_depth": {"freeze.depth": "all", **RATES},
    "full": RATES,
    "linear_probe": {"train.head_lr": RATES["train.head_lr"]},
}
STRATEGIES = {"freeze": "freeze_depth", "probe": "linear_probe"}
STAGES = 4
PART = 256
"""Rows of a commit."""


def search_row(arm: str, number: int, status: str, score: float | None, **more: Any) -> dict[str, Any]:
    """A trial of a search, with the columns that a comparison reads."""
    return {
        "trial_id": f"{arm}-{number:05d}",
        "arm": arm,
        "number": number,
        "round": "search",
        "status": status,
        "reason": "loss is nan" if status == "failed" else None,
        "strategy": STRATEGIES.get(arm, "full"),
        "seed": 1000 + number,
        "val_score": score if status == "complete" else None,
        "last_score": None if status == "failed" else score,
        "seconds": 1.0,
        "spent_s": 1.0,
        "alone_s": None if status == "failed" else 2.0,
        "peak_mib": 100.0,
        "trainable_params": {"freeze": 5000, "probe": 250}.get(arm, 20_000),
        "freeze_depth": {"freeze": 2, "probe": STAGES}.get(arm, 0),
        "stages": STAGES,
        "tell_seq": number,
        **more,
    }


def confirm_row(
    finalist: Mapping[str, Any], index: int, score: float | None, *, seed: int, n_test: int, n_train: int
) -> dict[str, Any]:
    """A confirmation; no score is a failure."""
    failed = score is None
    return {
        **finalist,
        "trial_id": f"{finalist['trial_id']}-c{index}",
        "round": "confirm",
        "status": "failed" if failed else "complete",
        "reason": "RuntimeError: out of memory" if failed else None,
        "seed": seed,
        "finalist_of": finalist["trial_id"],
        "val_score": score,
        "last_score": score,
        "test_score": score,
        "test_accuracy": score,
        "test_nll": None if failed else 1 - score,
        "n_train": n_train,
        "n_test": None if failed else n_test,
        "peak_mib": finalist["peak_mib"] + index,
        "stored_bytes": None if failed else 4 * finalist["trainable_params"] + 100,
    }


def prediction_table(trial_id: str, accuracy: float, n_test: int) -> pa.Table:
    """Predictions of two classes, right with confidence 0.9 on the first samples and wrong with 0.6 on the others."""
    right = np.arange(n_test) < round(accuracy * n_test)
    sure = np.where(right, 0.9, 0.6)
    likely = np.stack([np.where(right, sure, 1 - sure), np.where(right, 1 - sure, sure)], axis=1)
    rows = [
        {
            "trial_id": trial_id,
            "sample_id": f"img/{n:05d}",
            "label": 0,
            "predicted": int(not right[n]),
            "probabilities": likely[n],
        }
        for n in reversed(range(n_test))
    ]
    return table_of("predictions", rows)


def write_study(
    folder: Path,
    scores: Mapping[str, Sequence[float | None]],
    *,
    trials: int = 12,
    statuses: Sequence[str] = ("complete", "complete", "pruned", "failed"),
    metric: str = "accuracy",
    per_class: int | None = 50,
    pool: int = 400,
    n_test: int = 200,
    seed: int = 0,
    data: str = "digits",
    split: str = "s0",
    backbone: str = "timm/resnet10t",
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    predictions: bool = True,
    spec_bytes: int = 0,
    curves: Mapping[str, Sequence[float]] | None = None,
    probes: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A study with these test scores by arm, one a seed (None: that confirmation failed; no scores: none was begun).

    Each arm has `trials` search trials with the statuses in turn; number 0 is the finalist. `curves` are the val scores by
    epoch that all confirmations of an arm had, `probes` rows of that table.
    """
    arms = {arm: {"strategy": (kind := STRATEGIES.get(arm, "full")), "space": SPACES[kind]} for arm in scores} | dict(
        arms or {}
    )
    raw = {
        "name": folder.name,
        "results": str(folder),
        "seed": seed,
        "data": {"path": data} | ({"per_class": per_class} if per_class else {}),
        "backbone": {"name": backbone},
        "objective": {"metric": metric},
        "search": {"trials": max(1, trials) * len(arms)},
        "confirm": {"seeds": max(map(len, scores.values())), "finalists": "arms"},
        "arms": arms,
    }
    job = parse_job(raw)
    facts = {"classes": ["a", "b"], "data_hash": data, "split_hash": split, "stages": list("abcd"), "hardware": "a CPU"}
    record = {"job": job.model_dump(mode="json"), "facts": facts}
    write_file(folder / "job.json", json.dumps(record).encode())
    splits = ["train"] * pool + ["test"] * n_test
    labels = [str(n % 2) for n in range(pool)] + ["0"] * n_test
    columns = {"sample_id": [f"img/{n}" for n in range(len(splits))], "label": labels, "split": splits}
    write_splits(folder, pa.table({**columns, "group_id": pa.nulls(len(splits)), "reason": pa.nulls(len(splits))}))
    rng = np.random.default_rng(seed)
    rows, asks, said, epochs = [], [], [], []
    for arm, tested in scores.items():
        for number in range(trials):
            status = "complete" if number == 0 else statuses[number % len(statuses)]
            score = 0.97 if number == 0 else float(rng.uniform(0.3, 0.9))
            if metric == "nll":
                score = 1 - score
            rows.append(search_row(arm, number, status, score, spec=f"{number:0{spec_bytes}d}" if spec_bytes else None))
            asks.append({"seq": number, "trial_id": rows[-1]["trial_id"], "arm": arm, "number": number, "batch": 0})
            asks[-1]["params"] = json.dumps(values(arms[arm], rng))
        finalist = next((row for row in rows if row["arm"] == arm), None)
        for index, score in enumerate(tested):
            assert finalist is not None
            n_train = 2 * per_class if per_class else pool
            row = confirm_row(finalist, index, score, seed=(1 << 30) + seed + index, n_test=n_test, n_train=n_train)
            rows.append(row)
            shown = enumerate((curves or {}).get(arm, ()), 1)
            epochs += [{"trial_id": row["trial_id"], "epoch": epoch, "val_score": val} for epoch, val in shown]
            if score is not None and predictions:
                accuracy = score if metric != "nll" else 1 - score
                said.append(prediction_table(row["trial_id"], accuracy, n_test))
    tables = {"asks": table_of("asks", asks)} if asks else {}
    tables |= {name: table_of(name, made) for name, made in (("epochs", epochs), ("probes", probes)) if made}
    if said:
        tables["predictions"] = pa.concat_tables(said)
    for part, first in enumerate(range(0, len(rows), PART)):
        commit_part(
            folder, (tables if part == 0 else {}) | {RECORD: table_of(RECORD, rows[first : first + PART])}, part
        )
    return folder


def values(arm: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A configuration of the arm's space."""
    found = {}
    for key, dimension in arm["space"].items():
        if dimension == "all":
            found[key] = int(rng.integers(STAGES + 1))
        elif isinstance(dimension, Mapping):
            low, high = np.log([dimension["low"], dimension["high"]])
            found[key] = float(np.exp(rng.uniform(low + 0.1 * (high - low), high - 0.1 * (high - low))))
        else:
            found[key] = dimension[int(rng.integers(len(dimension)))]
    return found


@contextmanager
def interrupted() -> Iterator[None]:
    """What runs within is interrupted when a trial reports its second epoch."""
    report = Study.report

    def stop(study: Study, records: Any) -> Any:
        if any(record.epoch == 2 for record in records.values()):
            raise KeyboardInterrupt
        return report(study, records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "report", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
