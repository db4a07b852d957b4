"""How well heads in closed form foretold what training reached: rank correlations over the cuts of one study."""

from __future__ import annotations

import math
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
    """`head_depth`: trials whose head stands at the cut. `freeze_depth`: trials frozen up to it, their head at the end."""
    tau: float
    """Kendall's tau-b, 1 where both order the cuts alike."""
    depth_tau: float | None
    """Of the cut itself, as if deeper were better: what knowing nothing of the data gives."""
    cuts: int
    trials: int
    """Complete ones at these cuts, of the search."""


def agreements(probes: Iterable[Mapping[str, Any]], trials: Iterable[Mapping[str, Any]], mode: Mode) -> list[Agreement]:
    """From rows of `probes` and `trials`; none of a kind where fewer than `LEAST` cuts have both scores, or all are equal."""
    sign = 1 if mode == "max" else -1
    foretold = _best((row["cut"], sign * row["val_score"]) for row in probes if row["val_score"] is not None)
    done = [
        row
        for row in trials
        if row["round"] == "search" and row["val_score"] is not None and row["freeze_depth"] is not None
    ]
    ends = [row["head_depth"] or row["stages"] for row in done]
    places = {
        "head_depth": [(end, sign * row["val_score"]) for end, row in zip(ends, done, strict=True)],
        "freeze_depth": [
            (row["freeze_depth"], sign * row["val_score"])
            for end, row in zip(ends, done, strict=True)
            if end == row["stages"]
        ],
    }
    return [found for by, reached in places.items() if (found := _agreement(by, foretold, reached))]


def told(found: Agreement) -> str:
    """It in words, with what it stands on."""
    by = found.by.replace("_", " ")
    alone = "" if found.depth_tau is None else f", that of the depth alone {found.depth_tau:.2f}"
    few = "; so few may agree by chance" * (found.cuts < 6)
    return (
        f"heads in closed form against the best trial of each {by}: Kendall's tau {found.tau:.2f}{alone} "
        f"(n = {found.cuts} depths, {found.trials} complete trials{few})"
    )


def _agreement(by: str, foretold: Mapping[int, float], reached: Sequence[tuple[int, float]]) -> Agreement | None:
    trained = _best((cut, score) for cut, score in reached if cut in foretold)
    if len(trained) < LEAST:
        return None
    cuts = sorted(trained)
    scores = [trained[cut] for cut in cuts]
    tau = kendall([foretold[cut] for cut in cuts], scores)
    if tau is None:
        return None
    return Agreement(by, tau, kendall(cuts, scores), len(cuts), sum(cut in trained for cut, _ in reached))


def _best(scores: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Cut -> its greatest score; scores that are not numbers count for nothing."""
    found: dict[int, float] = {}
    for cut, score in scores:
        if not math.isnan(score):
            found[cut] = max(score, found.get(cut, score))
    return found
