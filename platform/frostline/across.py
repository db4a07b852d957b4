"""Arms over several tasks: mean ranks, and the interquartile mean of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from frostline import stats
from frostline.arms import ArmResult, worst_of
from frostline.pairs import ALPHA
from frostline.spec import Mode


@dataclass(frozen=True)
class Across:
    """The arms that are confirmed in every task, as JSON values. A failed seed counts as the worst score of its task."""

    tasks: int
    seeds: int
    """Of each arm and task, in the interquartile mean."""
    arms: list[dict[str, Any]]
    """By mean rank, the best first: label, mean_rank, iqm, iqm_low, iqm_high."""
    friedman: dict[str, float] | None
    """chi_square, p, critical_difference (Nemenyi's); None for two arms."""
    pairs: list[dict[str, Any]]
    """a, b (a ranks better), p (Wilcoxon's signed ranks over tasks), p_holm."""
    verdict: str


def across(tasks: Sequence[Sequence[ArmResult]], mode: Mode) -> Across | None:
    """Rank the arms that are confirmed in every task, told by their labels; None for one task or fewer than two such arms.

    Scores are compared as they are, not normalised: a task on which arms differ more weighs more in the interquartile
    mean, and the same in ranks.
    """
    by_label = [{arm.label: list(arm.scores.values()) for arm in task if arm.confirmations} for task in tasks]
    labels = [label for label in by_label[0] if all(label in task for task in by_label)] if len(tasks) > 1 else []
    if len(labels) < 2:
        return None
    scores: dict[str, list[list[float]]] = {label: [] for label in labels}
    for task in by_label:
        worst = worst_of([score for label in labels for score in task[label]], mode)
        if worst is None:
            return None
        for label in labels:
            scores[label].append([worst if score is None else score for score in task[label]])
    seeds = min(len(task) for each in scores.values() for task in each)
    sign = 1 if mode == "max" else -1
    means = {label: sign * np.array([fmean(task) for task in scores[label]]) for label in labels}
    ranks = dict(zip(labels, stats.mean_ranks(np.stack(list(means.values()), axis=1)).tolist(), strict=True))
    rows = []
    for label in sorted(labels, key=lambda label: (ranks[label], label)):
        table = np.array([task[:seeds] for task in scores[label]])  # (tasks, seeds)
        low, high = stats.iqm_interval(table)
        rows.append(
            {"label": label, "mean_rank": ranks[label], "iqm": stats.iqm(table), "iqm_low": low, "iqm_high": high}
        )
    order = [row["label"] for row in rows]
    pairs = [{"a": a, "b": b, "p": stats.signed_rank_p(means[a] - means[b])} for a, b in combinations(order, 2)]
    p_holm = stats.holm([pair["p"] for pair in pairs])
    pairs = [pair | {"p_holm": p} for pair, p in zip(pairs, p_holm, strict=True)]
    friedman = _friedman(np.stack([means[label] for label in order], axis=1)) if len(labels) > 2 else None
    return Across(len(tasks), seeds, rows, friedman, pairs, _verdict(rows, pairs, len(tasks)))


def _friedman(means: np.ndarray) -> dict[str, float]:
    chi_square, p = stats.friedman(means)
    return {"chi_square": chi_square, "p": p, "critical_difference": stats.critical_difference(*means.shape)}


def _verdict(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], tasks: int) -> str:
    """Who ranks best, and which arms are told apart over the tasks."""
    best = rows[0]["label"]
    said = f"Over {tasks} tasks {best} has the best mean rank, {rows[0]['mean_rank']:.2f}."
    apart = [f"{pair['a']} from {pair['b']}" for pair in pairs if pair["p_holm"] <= ALPHA]
    if apart:
        return f"{said} Ranks tell {', '.join(apart)}."
    needed = next(n for n in range(2, 99) if len(pairs) * 2.0 ** (1 - n) <= ALPHA)
    few = f": {needed} tasks at least are needed for that" if tasks < needed else ""
    return f"{said} No arm is distinguishable from another by ranks over tasks{few}."
