"""What a report draws of a study's rows: JSON values, thinned where there are many. Pure functions from rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from frostline import results
from frostline.models import Range
from frostline.spec import Arm, Mode, is_searched
from frostline.stats import mean_interval

FEW = 3
"""Fewer trials at a depth have no interval: of two it is 9 standard deviations to either side."""
TRIALS = 1500
"""Drawn of a study's, at most."""
CURVES = 120
"""Trials whose training is drawn, at most."""
EPOCHS = 60
"""Drawn of each of these, at most, and the last."""
CELLS = 8
"""Of a learning rate's range."""

COLUMNS = {
    "freeze.depth": "freeze_depth",
    "freeze.norm": "norm",
    "freeze.layer_decay": "layer_decay",
    "head.hidden": "head_hidden",
    "head.dropout": "head_dropout",
    "head.init": "head_init",
    "train.optimizer": "optimizer",
    "train.lr": "lr",
    "train.head_lr": "head_lr",
    "train.weight_decay": "weight_decay",
    "train.batch_size": "batch_size",
}
"""Searched key -> the column that has its value in every arm, those that hold it included."""

_READ = (
    *(
        "trial_id",
        "arm",
        "status",
        "error_kind",
        "reason",
        "val_score",
        "last_score",
        "epochs",
        "epochs_asked",
        "stages",
    ),
    *("seconds", "spent_s", "alone_s", "peak_mib", "trainable_params", "tell_seq", "strategy", "images_forward"),
    *COLUMNS.values(),
)


@dataclass(frozen=True)
class Axis:
    """An axis of the parallel coordinates. Values lie from 0 to 1 on it; choices at equal distances."""

    key: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    def place(self, value: Any) -> float | None:
        """Where a value lies; None where it is none of the axis."""
        if value is None or (self.choices and value not in self.choices):
            return None
        if self.choices:
            return self.choices.index(value) / max(1, len(self.choices) - 1)
        assert self.low is not None
        assert self.high is not None
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5


def search_trials(study: str | Path) -> list[dict[str, Any]]:
    """Trials of the search that have finished, in the order in which they did, with the values that they were asked with; what is not
    finite is None."""
    table = results.read_trials(study)
    searched = pa.array([each == "search" for each in table["round"].to_pylist()], pa.bool_())
    rows = table.filter(searched).select(_READ).sort_by("tell_seq").to_pylist()
    asked = results.read_asks(study).select(["trial_id", "params"]).to_pydict()
    values = dict(zip(asked["trial_id"], asked["params"], strict=True))
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        | {"values": json.loads(values.get(row["trial_id"], "{}"))}
        for row in rows
    ]


def score_of(trial: Mapping[str, Any]) -> float | None:
    """The objective after the last epoch that it trained: of a pruned trial lower than it would have become."""
    return None if trial["status"] == "failed" else trial["last_score"]


def best_first(trials: Iterable[Mapping[str, Any]], mode: Mode) -> list[Mapping[str, Any]]:
    """Complete trials by score, then pruned ones by theirs, then failed ones; ties as they were."""
    sign = -1 if mode == "max" else 1

    def place(trial: Mapping[str, Any]) -> tuple[int, float]:
        score = score_of(trial)
        return results.STATUSES.index(trial["status"]), math.inf if score is None else sign * score

    return sorted(trials, key=place)


def thinned(trials: Sequence[Mapping[str, Any]], most: int, mode: Mode) -> list[Mapping[str, Any]]:
    """At most so many of these trials: the best for a half, and of the others as many at equal distances, in their order."""
    if len(trials) <= most:
        return list(trials)
    ordered = best_first(trials, mode)
    best = {trial["trial_id"] for trial in ordered[: most // 2]}
    others = [trial for trial in trials if trial["trial_id"] not in best]
    kept = {others[index]["trial_id"] for index in np.linspace(0, len(others) - 1, most - most // 2).astype(int)}
    return [trial for trial in trials if trial["trial_id"] in best or trial["trial_id"] in kept]


def told(drawn: int, of: int, what: str, which: str = "the best, and others at equal distances") -> str:
    """What was thinned, as a sentence; empty where nothing was."""
    if drawn == of:
        return ""
    return f"Drawn are {drawn:,} of {of:,} {what}: {which}. "


def curves(study: str | Path, trial_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Score and losses by epoch of these trials, at most about EPOCHS epochs of each."""
    epochs = results.read_epochs(study).select(["trial_id", "epoch", "val_score", "train_loss", "val_loss"])
    wanted = set(trial_ids)
    epochs = epochs.filter(pa.array([each in wanted for each in epochs["trial_id"].to_pylist()], pa.bool_()))
    last: dict[str, int] = {}
    for trial_id, epoch in zip(epochs["trial_id"].to_pylist(), epochs["epoch"].to_pylist(), strict=True):
        last[trial_id] = max(epoch, last.get(trial_id, 0))
    return [
        row
        for row in epochs.to_pylist()
        if row["val_score"] is not None
        and math.isfinite(row["val_score"])
        and (
            row["epoch"] == last[row["trial_id"]] or (row["epoch"] - 1) % math.ceil(last[row["trial_id"]] / EPOCHS) == 0
        )
    ]


def depths(trials: Sequence[Mapping[str, Any]], mode: Mode) -> list[dict[str, Any]]:
    """By arm and freeze depth: n complete trials, the mean of their scores, its t-interval where there are FEW or more, and
    the best."""
    groups: dict[tuple[str, int], list[float]] = {}
    for trial in trials:
        if trial["val_score"] is not None and trial["freeze_depth"] is not None:
            groups.setdefault((trial["arm"], trial["freeze_depth"]), []).append(trial["val_score"])
    rows = []
    for (arm, depth), scores in sorted(groups.items()):
        found = mean_interval(scores)
        best = max(scores) if mode == "max" else min(scores)
        low, high = (found.low, found.high) if found.n >= FEW else (None, None)
        rows.append(
            {"arm": arm, "depth": depth, "n": found.n, "mean": found.mean, "low": low, "high": high, "best": best}
        )
    return rows


def rate_cells(trials: Sequence[Mapping[str, Any]], rate: str, mode: Mode) -> list[dict[str, Any]]:
    """The best score of trials in cells of freeze depth and of the logarithm of a learning rate (`lr` or `head_lr`). Where
    only the head trains `lr` moves nothing, and those trials are left out of its cells."""
    known = [
        (trial[rate], trial["freeze_depth"], score)
        for trial in trials
        if (score := score_of(trial)) is not None
        and trial[rate]
        and trial["freeze_depth"] is not None
        and (rate == "head_lr" or trial["freeze_depth"] < trial["stages"])
    ]
    if len({value for value, _, _ in known}) < 2:
        return []
    edges = np.geomspace(min(value for value, _, _ in known), max(value for value, _, _ in known), CELLS + 1)
    cells: dict[tuple[int, int], list[float]] = {}
    for value, depth, score in known:
        column = int(np.clip(np.searchsorted(edges, value, side="right") - 1, 0, CELLS - 1))
        cells.setdefault((column, depth), []).append(score)
    best = max if mode == "max" else min
    return [
        {
            "low": float(edges[column]),
            "high": float(edges[column + 1]),
            "depth": depth,
            "n": len(scores),
            "best": best(scores),
        }
        for (column, depth), scores in sorted(cells.items())
    ]


def front(trials: Sequence[Mapping[str, Any]], cost: str, mode: Mode) -> list[Mapping[str, Any]]:
    """Complete trials that none beats in score at their cost or less, by rising cost."""
    sign = 1 if mode == "max" else -1
    known = [trial for trial in trials if trial["val_score"] is not None and trial[cost] is not None]
    found: list[Mapping[str, Any]] = []
    for trial in sorted(known, key=lambda trial: (trial[cost], -sign * trial["val_score"])):
        if not found or sign * trial["val_score"] > sign * found[-1]["val_score"]:
            found.append(trial)
    return found


def value_of(trial: Mapping[str, Any], key: str) -> Any:
    """What a trial had for a searched key, held values included where a column has them."""
    found = trial[COLUMNS[key]] if key in COLUMNS else None
    return trial["values"].get(key) if found is None else found


def axes(arms: Mapping[str, Arm], trials: Sequence[Mapping[str, Any]]) -> list[Axis]:
    """An axis for the arm if there are several, one for each key that any searches and of which there are two values, and
    one for the score."""
    found = [Axis("arm", choices=tuple(arms))] if len(arms) > 1 else []
    searched: dict[str, bool] = {}  # key -> whether its logarithm is
    for arm in arms.values():
        for key, dimension in arm.space.items():
            if is_searched(key, dimension):
                searched[key] = searched.get(key, False) or (isinstance(dimension, Range) and dimension.log)
    for key, log in searched.items():
        values = {value for trial in trials if (value := value_of(trial, key)) is not None}
        if len(values) > 1:
            found.append(_axis(key, values, log))
    scores = [score for trial in trials if (score := score_of(trial)) is not None]
    return [*found, Axis("score", min(scores), max(scores))] if scores else []


def _axis(key: str, values: set[Any], log: bool) -> Axis:
    numbers = all(type(value) in (int, float) for value in values)
    if not numbers or (len(values) <= 6 and not log and key != "freeze.depth"):
        return Axis(key, choices=tuple(sorted(values, key=lambda value: (type(value) is str, value))))
    return Axis(key, min(values), max(values), log and min(values) > 0)
