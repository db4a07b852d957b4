"""What pretrained weights gained: an arm that starts from them against the arm that trains the same network from random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from frostline.arms import FROM_NOTHING, ArmResult
from frostline.pairs import Pair
from frostline.spec import Mode
from frostline.stats import Interval


@dataclass(frozen=True)
class Gain:
    """Of one task, as JSON values; the arm is the one with the best mean test score among those that transfer."""

    arm: str
    scratch: str
    score: float | None
    """The arm's mean test score."""
    scratch_score: float | None
    gain: Interval
    """Of test scores, the arm's less those from scratch, paired by seed."""
    target: float | None
    """Mean val score of the arm from scratch, after its last epoch."""
    epochs: float | None
    """In which the other arm first had that, mean over the seeds that came to it."""
    reached: int
    """How many seeds those are."""
    scratch_epochs: int
    """That the arm from scratch trained for."""
    closed_form: Mapping[str, Any] | None
    """The best head in closed form on pretrained features, by val, as a row of `probes`. How well the source's
    features serve the target as they are is how near the two are; None where the study fitted none."""


def gain_of(arms: Sequence[ArmResult], pairs: Sequence[Pair], mode: Mode) -> Gain | None:
    """Of a task's arms, the best first, and their pairs; None where it has no two such arms on test."""
    scored = [arm for arm in arms if arm.finalist and arm.finalist.test.n]
    scratch = next((arm for arm in scored if arm.strategy == FROM_NOTHING), None)
    other = next((arm for arm in scored if arm.strategy != FROM_NOTHING), None)
    if scratch is None or other is None:
        return None
    pair = next(pair for pair in pairs if {pair.a, pair.b} == {scratch.label, other.label})
    theirs, ours = _curves(scratch), _curves(other)
    target = fmean(curve[-1] for curve in theirs) if theirs else None
    first = [_first(curve, target, mode) for curve in ours] if target is not None else []
    came = [epoch for epoch in first if epoch is not None]
    return Gain(
        arm=other.label,
        scratch=scratch.label,
        score=other.finalist.test.mean if other.finalist else None,
        scratch_score=scratch.finalist.test.mean if scratch.finalist else None,
        gain=pair.difference if pair.a == other.label else _turned(pair.difference),
        target=target,
        epochs=fmean(came) if came else None,
        reached=len(came),
        scratch_epochs=max(map(len, theirs), default=0),
        closed_form=other.closed_form,
    )


def _turned(found: Interval) -> Interval:
    """Of b - a, that of a - b."""
    mean, low, high = (None if value is None else -value for value in (found.mean, found.low, found.high))
    return Interval(found.n, mean, high, low)


def _curves(arm: ArmResult) -> list[list[float]]:
    """Val scores by epoch, of each confirmation that has them."""
    curves: list[Mapping[str, Any]] = [each for each in arm.confirmations if each["val_scores"]]
    return [list(each["val_scores"]) for each in curves]


def _first(curve: Sequence[float], target: float, mode: Mode) -> int | None:
    """The first epoch, counted from 1, whose score is no worse than the target."""
    sign = 1 if mode == "max" else -1
    return next((epoch for epoch, score in enumerate(curve, 1) if sign * score >= sign * target), None)
