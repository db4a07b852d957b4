"""How well heads in closed form foretold what training reached: rank correlations over the cuts of one study."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.spec import Mode
from frostline.stats import kendall

LEAST = 3
"""Cuts below which nothing is said."""


@dataclass(frozen=True)
class Agreement:
    """Between the best head in closed form at each cut and the best complete trial there."""

    by: str
    """`head_depth`: trials in which nothing trains but a head at the cut, which is what those in closed form are.
    `freeze_depth`: trials frozen up to the cut, their head at the end."""
    tau: float
    """Kendall's tau-b, 1 where both order the cuts alike."""
    depth_tau: float | None
    """Of the cut itself, as if deeper were better: what knowing nothing of the data gives."""
    cuts: int
    trials: int
    """Complete ones at these cuts, of the search."""
    fewest: int
    """Of them at the cut that has the fewest: the best of few says more of their learning rates than of the cut."""


def agreements(probes: Iterable[Mapping[str, Any]], trials: Iterable[Mapping[str, Any]], mode: Mode) -> list[Agreement]:
    """From rows of `probes` and `trials`; none of a kind where fewer than `LEAST` cuts have both scores, or all are equal."""
    sign = 1 if mode == "max" else -1
    foretold = _best((row["cut"], sign * row["val_score"]) for row in probes if _known(row["val_score"]))
    places: dict[str, list[tuple[int, float]]] = {"head_depth": [], "freeze_depth": []}
    for row in trials:
        cut, stages = row["freeze_depth"], row["stages"]
        end = row["head_depth"] or stages
        if row["round"] != "search" or not _known(row["val_score"]) or cut not in foretold:
            continue
        if cut == end:
            places["head_depth"].append((cut, sign * row["val_score"]))
        if end == stages:
            places["freeze_depth"].append((cut, sign * row["val_score"]))
    return [found for by, reached in places.items() if (found := _agreement(by, foretold, reached))]


def told(found: Agreement) -> str:
    """It in words, with what it stands on."""
    best = {"head_depth": "trained head at each depth", "freeze_depth": "trial of each freeze depth"}[found.by]
    alone = "" if found.depth_tau is None else f", that of the depth alone {found.depth_tau:.2f}"
    few = "; so few depths may agree by chance" * (found.cuts < 6)
    return (
        f"heads in closed form against the best {best}: Kendall's tau {found.tau:.2f}{alone} "
        f"({found.cuts} depths, {found.trials} complete trials, at one depth {found.fewest}{few})"
    )


def _agreement(by: str, foretold: Mapping[int, float], reached: Sequence[tuple[int, float]]) -> Agreement | None:
    trained = _best(reached)
    if len(trained) < LEAST:
        return None
    cuts = sorted(trained)
    scores = [trained[cut] for cut in cuts]
    tau = kendall([foretold[cut] for cut in cuts], scores)
    if tau is None:
        return None
    fewest = min(Counter(cut for cut, _ in reached).values())
    return Agreement(by, tau, kendall(cuts, scores), len(cuts), len(reached), fewest)


def _known(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _best(scores: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Cut -> its greatest score."""
    found: dict[int, float] = {}
    for cut, score in scores:
        found[cut] = max(score, found.get(cut, score))
    return found
