"""Which trials of an arm are stopped early, decided from sorted lists of scores.

Both rules decide as Optuna 5's pruners of the same name, which walk all trials at every report: tests hold it.
"""

from __future__ import annotations

import math
from array import array
from bisect import insort
from collections.abc import Mapping

from frostline.spec import Pruner

Scores = Mapping[int, tuple[int, float]]
"""Trial number -> its last epoch, counted from 1, and its score there."""

ENOUGH = 5  # complete trials, before the median stops any


class Halving:
    """Asynchronous successive halving (Li et al. 2020): a rung lies at every grace * factor^k epochs, and of the scores
    that have reached it the best one in `factor` go on."""

    def __init__(self, grace: int, factor: int, *, maximize: bool) -> None:
        self.grace, self.factor, self.maximize = grace, factor, maximize
        self.rungs: list[array[float]] = []  # ascending
        self.reached: dict[int, int] = {}  # running trial -> rungs that it has scored at

    def report(self, scores: Scores) -> dict[int, bool]:
        """Which of these trials should stop now. At each rung all scores are entered before any is judged."""
        stops = dict.fromkeys(scores, False)
        longest = max((epoch for epoch, _ in scores.values()), default=0)
        while longest >= self.grace * self.factor ** len(self.rungs):
            self.rungs.append(array("d"))
        for rung in range(len(self.rungs)):
            here = {
                number: score
                for number, (epoch, score) in scores.items()
                if epoch >= self.grace * self.factor**rung and self.reached.get(number, 0) == rung and not stops[number]
            }
            for number, score in here.items():
                if not math.isnan(score):
                    insort(self.rungs[rung], score)
                    self.reached[number] = rung + 1
            for number, score in here.items():
                stops[number] = math.isnan(score) or not self._goes_on(score, self.rungs[rung])
        return stops

    def _goes_on(self, score: float, rung: array[float]) -> bool:
        last = max(len(rung) // self.factor, 1)
        return score >= rung[-last] if self.maximize else score <= rung[last - 1]

    def end(self, number: int, status: str) -> None:
        """A trial has ended: `complete`, `pruned` or `failed`. Its scores stay."""
        self.reached.pop(number, None)


class Median:
    """A trial stops where its best score so far is worse than the median, at the same epoch, of the complete trials."""

    def __init__(self, grace: int, *, maximize: bool) -> None:
        self.grace, self.maximize = grace, maximize
        self.complete = 0
        self.epochs: dict[int, array[float]] = {}  # epoch -> scores of complete trials, ascending
        self.running: dict[int, dict[int, float]] = {}
        self.best: dict[int, float] = {}

    def report(self, scores: Scores) -> dict[int, bool]:
        """Which of these trials should stop now."""
        for number, (epoch, score) in scores.items():
            self.running.setdefault(number, {})[epoch] = score
            best = self.best.get(number, math.nan)
            better = math.isnan(best) or (score > best if self.maximize else score < best)
            self.best[number] = score if better else best
        return {number: self._stops(number, epoch) for number, (epoch, _) in scores.items()}

    def _stops(self, number: int, epoch: int) -> bool:
        best, there = self.best[number], self.epochs.get(epoch, array("d"))
        if self.complete < ENOUGH or epoch < self.grace:
            return False
        if math.isnan(best) or not there:
            return math.isnan(best)
        low, high = there[(len(there) - 1) // 2], there[len(there) // 2]
        median = high - (high - low) * 0.5  # rounded as numpy's
        return best < median if self.maximize else best > median

    def end(self, number: int, status: str) -> None:
        """A trial has ended: `complete`, `pruned` or `failed`. Others are compared with complete ones."""
        self.best.pop(number, None)
        scores = self.running.pop(number, {})
        if status == "complete":
            self.complete += 1
            for epoch, score in scores.items():
                if not math.isnan(score):
                    insort(self.epochs.setdefault(epoch, array("d")), score)


class Never:
    """No early stopping."""

    def report(self, scores: Scores) -> dict[int, bool]:
        """Which of these trials should stop now: none."""
        return dict.fromkeys(scores, False)

    def end(self, number: int, status: str) -> None:
        """A trial has ended."""


Rule = Halving | Median | Never


def build_rule(pruner: Pruner, *, maximize: bool) -> Rule:
    """The rule that a job names."""
    match pruner.kind:
        case "halving":
            return Halving(pruner.grace_epochs, pruner.factor, maximize=maximize)
        case "median":
            return Median(pruner.grace_epochs, maximize=maximize)
        case "none":
            return Never()
