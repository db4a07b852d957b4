"""Two arms against each other on paired seeds, and the verdict, which may be that they cannot be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from frostline import stats
from frostline.arms import Answers
from frostline.spec import Mode
from frostline.stats import Interval

ALPHA = 0.05
"""The level of every verdict, over all pairs of a task (Holm)."""

Verdict = Literal["better", "better here", "not distinguishable", "not compared"]


@dataclass(frozen=True)
class Pair:
    """Two arms of a task on the seeds that both have, as JSON values; `a` has the better mean there."""

    a: str
    b: str
    difference: Interval
    """Of test scores, a - b, paired by seed. The interval is of this train pool and test set, and of this pair alone."""
    other_pools: Interval
    """The same for other train pools of the kind: see stats.mean_interval."""
    p: float | None
    """Of a paired t-test; None below two seeds."""
    p_holm: float | None
    """Adjusted for all pairs of the task."""
    superiority: float | None
    """P(A > B): see stats.superiority."""
    other_samples: Interval
    """Of accuracies, a - b, over test samples, each seed's models weighing the same: see stats.samples_interval."""
    mcnemar: list[dict[str, Any]]
    """By seed, on the same test samples: seed, only_a and only_b (how many only one of them got right), p."""
    mcnemar_p: float | None
    """Of all seeds together: see stats.combined_p."""
    mcnemar_holm: float | None
    verdict: Verdict
    """`better`: p_holm is at most 0.05, and so is mcnemar_holm, for a. `better here`: only p_holm is, so that other test
    samples may not show it. `not compared`: fewer than two seeds in common."""
    reason: str | None
    """Of the verdict, where these numbers do not say it."""

    @property
    def pool_bound(self) -> bool:
        """Whether a is better, and the interval for other train pools does not exclude that it is not."""
        low, high = self.other_pools.low, self.other_pools.high
        return self.verdict.startswith("better") and low is not None and high is not None and low <= 0 <= high


def compare_pairs(
    scores: Mapping[str, Mapping[int, float | None]],
    answers: Mapping[str, Mapping[int, Answers]],
    mode: Mode,
    overlap: float,
) -> list[Pair]:
    """All pairs of arms, from label -> seed -> test score (None: it failed) and label -> seed -> answers on the test samples;
    `overlap` as in stats.mean_interval."""
    found = [_measured(labels, scores, answers, mode, overlap) for labels in combinations(scores, 2)]
    p_holm, mcnemar_holm = _adjusted([pair.p for pair in found]), _adjusted([pair.mcnemar_p for pair in found])
    found = [replace(pair, p_holm=p, mcnemar_holm=m) for pair, p, m in zip(found, p_holm, mcnemar_holm, strict=True)]
    return [_judged(pair, sum(score is None for score in scores[pair.a].values())) for pair in found]


def _measured(
    labels: tuple[str, str],
    scores: Mapping[str, Mapping[int, float | None]],
    answers: Mapping[str, Mapping[int, Answers]],
    mode: Mode,
    overlap: float,
) -> Pair:
    a, b = labels
    sign = 1 if mode == "max" else -1
    shared = [seed for seed in scores[a] if seed in scores[b]]
    both = [(x, y) for seed in shared if (x := scores[a][seed]) is not None and (y := scores[b][seed]) is not None]
    differences = np.array([x - y for x, y in both])
    if len(both) and sign * differences.mean() < 0:
        a, b, differences = b, a, -differences
    ranked = [[None if (score := scores[label][seed]) is None else sign * score for seed in shared] for label in (a, b)]
    ours, theirs = answers.get(a, {}), answers.get(b, {})
    said = {seed: (ours[seed], theirs[seed]) for seed in shared if seed in ours and seed in theirs}
    tests = [_mcnemar(seed, *both) for seed, both in said.items()]
    gaps = [x.correct.astype(float) - y.correct for x, y in said.values()]
    return Pair(
        a=a,
        b=b,
        difference=stats.mean_interval(differences),
        other_pools=stats.mean_interval(differences, overlap),
        p=stats.paired_p(differences),
        p_holm=None,
        superiority=stats.superiority(*ranked) if shared else None,
        other_samples=stats.samples_interval(np.mean(gaps, axis=0) if gaps else np.array([])),
        mcnemar=tests,
        mcnemar_p=stats.combined_p([test["p"] for test in tests]) if tests else None,
        mcnemar_holm=None,
        verdict="not compared",
        reason=None,
    )


def _mcnemar(seed: int, a: Answers, b: Answers) -> dict[str, Any]:
    assert a.samples == b.samples, "one split hash, and other test samples"
    only_a, only_b = int((a.correct & ~b.correct).sum()), int((b.correct & ~a.correct).sum())
    return {"seed": seed, "only_a": only_a, "only_b": only_b, "p": stats.mcnemar(only_a, only_b)}


def _adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment of those that there are."""
    adjusted = iter(stats.holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]


def _judged(pair: Pair, failed: int) -> Pair:
    """The pair with its verdict; `failed` confirmations of its `a` failed."""
    n = pair.difference.n
    if pair.p_holm is None:
        none = "no completed seed in common" if n == 0 else "one completed seed in common, and two are needed"
        return replace(pair, reason=none)
    if pair.p_holm > ALPHA:
        constant = pair.difference.low is None and pair.difference.mean != 0
        reason = f"all {n} seeds differ alike: there is no spread to judge by" if constant else None
        return replace(pair, verdict="not distinguishable", reason=reason)
    if failed:
        reason = f"{failed} of its confirmations failed, which counts as worst: {pair.a} is not called better"
        return replace(pair, verdict="not distinguishable", reason=reason)
    wins = sum(test["only_a"] - test["only_b"] for test in pair.mcnemar)
    if pair.mcnemar_holm is not None and pair.mcnemar_holm <= ALPHA and wins > 0:
        return replace(pair, verdict="better")
    reason = "other test samples may not show it" if pair.mcnemar else "no predictions of the same test samples"
    return replace(pair, verdict="better here", reason=reason)
