"""Statistics for the comparison of arms: intervals, tests, curves, fronts. Pure functions on arrays, higher is better.

Scores are those of confirmations: one per seed, and each seed draws its own train subset, order, head and dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

LEVEL = 0.95
"""Of every interval."""
BINS = 15
"""Of the calibration error."""
REPLICATES = 2000
"""Of every bootstrap."""


@dataclass(frozen=True)
class Interval:
    """A mean of n values and its 95 % interval; low and high are None where n values do not give one."""

    n: int
    mean: float | None
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float] | np.ndarray, overlap: float = 0.0) -> Interval:
    """Student's t-interval for the mean of (n,) values; none below two values, or where all are equal.

    With `overlap` 0 the values are independent draws. Scores on one test set are that, given the train pool and the test
    set: each seed draws its subset of the pool anew, so the interval claims the mean over all subsets and seeds for this
    pool and this test set, however large the subsets are, and nothing beyond.

    For other pools of the same kind they are not independent, as any two subsets of m samples from a pool of N share a
    fraction m / N on average. As Nadeau and Bengio (2003) do for test sets, scores are taken to correlate by the share
    that they have in common, and the variance of the mean is s^2 (1/n + overlap / (1 - overlap)). That share is an upper
    bound of the correlation to first order: what head, order and dropout add is not shared. An `overlap` of 1 (each seed
    trains on the whole pool) says nothing of other pools: no interval.
    """
    values = np.asarray(values, float)
    n, mean = len(values), float(values.mean()) if len(values) else None
    if mean is None or n < 2 or overlap >= 1 or _constant(values):
        return Interval(n, mean, None, None)
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * _error(values, overlap)
    return Interval(n, mean, mean - half, mean + half)


def paired_p(differences: Sequence[float] | np.ndarray) -> float | None:
    """Two-sided p-value of the mean of (n,) paired differences, by Student's t; None below two.

    Where all are equal, and not 0, there is no spread to judge by, and flipping signs gives the exact 2^(1 - n).
    """
    differences = np.asarray(differences, float)
    n, mean = len(differences), float(differences.mean()) if len(differences) else 0.0
    if n < 2:
        return None
    if _constant(differences):
        return 1.0 if math.isclose(mean, 0, abs_tol=1e-12) else 2.0 ** (1 - n)
    return float(2 * special.stdtr(n - 1, -abs(mean) / _error(differences)))


def _constant(values: np.ndarray) -> bool:
    """Whether all are equal, but for what rounding leaves."""
    return bool(np.ptp(values) <= 1e-12 * max(1.0, np.abs(values).max()))


def _error(values: np.ndarray, overlap: float = 0.0) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) * math.sqrt(1 / len(values) + overlap / (1 - overlap)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, step down (Holm 1979), in the order given."""
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = so_far
    return adjusted


def combined_p(p_values: Sequence[float]) -> float:
    """One p-value from several of the same hypothesis, however they depend on each other: the k-th least of n, times n / k,
    with k half of n, rounded up (Rueger 1978)."""
    n, k = len(p_values), math.ceil(len(p_values) / 2)
    return min(1.0, sorted(p_values)[k - 1] * n / k)


def superiority(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    """P(A > B): the share of seeds on which A scores above B, a tie counting half (Bouthillier et al. 2021).

    `a` and `b` are (n,), paired, n at least 1; None is a failure, which is worse than any score.
    """
    wins = [_key(x) > _key(y) for x, y in zip(a, b, strict=True)]
    ties = [_key(x) == _key(y) for x, y in zip(a, b, strict=True)]
    return (sum(wins) + sum(ties) / 2) / len(a)


def _key(score: float | None) -> float:
    return -math.inf if score is None else score


def mcnemar(only_a: int, only_b: int) -> float:
    """Mid-p value of McNemar's exact test, from how many samples A alone and B alone got right (Fagerland et al. 2013)."""
    n, least = only_a + only_b, min(only_a, only_b)
    below = special.bdtr(least - 1, n, 0.5) if least else 0.0
    return float(special.bdtr(least, n, 0.5) + below) if n else 1.0


def samples_interval(differences: np.ndarray, replicates: int = REPLICATES) -> Interval:
    """The mean of (n,) differences by test sample, and its 95 % interval by the percentile bootstrap over samples: for other
    test samples like these, answered by the same trained models. None below two samples, or where all are equal.

    Samples with the same difference are interchangeable, so a replicate draws how often each value comes.
    """
    differences = np.asarray(differences, float)
    n, mean = len(differences), float(differences.mean()) if len(differences) else None
    if n < 2 or _constant(differences):
        return Interval(n, mean, None, None)
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(n, counts / n, replicates)
    return Interval(n, mean, *_percentiles(drawn @ values / n))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of top-label confidences (n,) against whether these were right (n,), n at least 1.

    The mean over samples of |accuracy - mean confidence| of their bin, with `bins` bins of equally many samples (Nguyen and
    O'Connor 2015), fewer where n is less; equal confidences share a bin, so that the order of samples does not matter. Like every
    binned estimate it is biased upwards, by about 0.8 sqrt(bins p (1 - p) / n) for a calibrated model of accuracy p.
    """
    n, confidence = len(confidence), np.asarray(confidence, float)
    edges = np.quantile(confidence, np.arange(1, min(bins, n)) / min(bins, n), method="inverted_cdf")
    bin_of = np.searchsorted(np.unique(edges), confidence, side="left")
    gaps = np.bincount(bin_of, np.asarray(correct, float) - confidence)
    return float(np.abs(gaps).sum() / n)


def expected_best(scores: Sequence[float] | np.ndarray, budgets: Sequence[int] | np.ndarray) -> np.ndarray:
    """The expected best of n of the B trials with these scores (B,), for each n of `budgets`, 1 <= n <= B: unbiased for
    n independent trials (Tang et al. 2020).

    The mean of the maximum over all subsets of n: the i-th least score is it in C(i - 1, n - 1) of the C(B, n). Subsets of more
    than half of the trials overlap so much that the estimate says little of other trials; callers stop there.
    """
    scores, budgets = np.sort(np.asarray(scores, float)), np.asarray(budgets)
    total, below = len(scores), np.arange(len(scores))
    assert budgets.min() >= 1, budgets
    assert budgets.max() <= total, budgets
    found = []
    for n in budgets.tolist():
        weights = np.exp(_log_choose(below[n - 1 :], n - 1) - _log_choose(total, n))
        found.append(float(weights @ scores[n - 1 :]))
    return np.array(found)


def _log_choose(n: Any, k: int) -> Any:
    n = np.asarray(n, float)
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def non_dominated(scores: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Which of the points (…, k) no other beats in score (higher) or cost (lower) while being no worse in the other.
    A point without a score or cost (NaN) is dominated."""
    scores, costs = np.where(np.isnan(costs), -np.inf, scores), np.where(np.isnan(scores), np.inf, costs)
    score, cost = scores[..., :, None], costs[..., :, None]  # the point; the others are in the last axis
    others, dearer = scores[..., None, :], costs[..., None, :]
    beaten = (others >= score) & (dearer <= cost) & ((others > score) | (dearer < cost))
    return ~beaten.any(axis=-1) & np.isfinite(scores) & np.isfinite(costs)


def front_shares(scores: np.ndarray, costs: np.ndarray, replicates: int = REPLICATES) -> np.ndarray:
    """The share of bootstrap replicates in which each of k points is non-dominated, (k,).

    `scores` and `costs` are (k, seeds), NaN where a seed failed. A replicate draws seeds with replacement, the same ones for
    all points, and takes means over those that did not fail.
    """
    seeds = scores.shape[1]
    drawn = np.random.default_rng(0).integers(seeds, size=(replicates, seeds))
    counts = np.stack([np.bincount(row, minlength=seeds) for row in drawn]).astype(float)  # (replicates, seeds)
    return non_dominated(_weighted(counts, scores), _weighted(counts, costs)).mean(axis=0)


def _weighted(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(replicates, k) means of (k, seeds) values, those that are NaN left out; NaN where none is left."""
    known = ~np.isnan(values)
    weight = counts @ known.T
    sums = counts @ np.where(known, values, 0.0).T
    return np.divide(sums, weight, out=np.full_like(sums, np.nan), where=weight > 0)


def iqm(scores: np.ndarray) -> float:
    """Interquartile mean of (tasks, seeds) scores: the mean of the middle half of all of them (Agarwal et al. 2021)."""
    return float(stats.trim_mean(scores.ravel(), 0.25))


def iqm_interval(scores: np.ndarray, replicates: int = REPLICATES) -> tuple[float, float]:
    """95 % interval of the interquartile mean of (tasks, seeds) scores by the stratified percentile bootstrap of Agarwal
    et al. (2021): within each task, seeds are drawn with replacement. It claims these tasks, not others like them."""
    tasks, seeds = scores.shape
    drawn = np.random.default_rng(0).integers(seeds, size=(replicates, tasks, seeds))
    found = stats.trim_mean(scores[np.arange(tasks)[:, None], drawn].reshape(replicates, -1), 0.25, axis=1)
    return _percentiles(found)


def _percentiles(replicates: np.ndarray) -> tuple[float, float]:
    """Between which `LEVEL` of the replicates of a bootstrap lie."""
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_ranks(scores: np.ndarray) -> np.ndarray:
    """Mean ranks (arms,) of (tasks, arms) scores, 1 the best, ties sharing the mean of their ranks."""
    return stats.rankdata(-scores, axis=1).mean(axis=0)


def friedman(scores: np.ndarray) -> tuple[float, float]:
    """Friedman's chi-square of (tasks, arms) scores and its p-value (3 arms or more), as Demsar (2006) has it: without a
    correction for ties, which makes it smaller."""
    tasks, arms = scores.shape
    spread = float((mean_ranks(scores) ** 2).sum()) - arms * (arms + 1) ** 2 / 4
    chi_square = 12 * tasks / (arms * (arms + 1)) * spread
    return chi_square, float(stats.chi2.sf(chi_square, arms - 1))


def critical_difference(tasks: int, arms: int) -> float:
    """Nemenyi's: mean ranks further apart than this differ at the 5 % level (Demsar 2006)."""
    q = stats.studentized_range.ppf(LEVEL, arms, math.inf) / math.sqrt(2)
    return float(q * math.sqrt(arms * (arms + 1) / (6 * tasks)))


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test on (tasks,) differences, the ranks of zeros split evenly, as Demsar (2006)
    does. By all flips of signs up to 15 tasks, of which n cannot give less than 2^(1 - n), by the normal distribution above."""
    ranks = stats.rankdata(np.abs(differences))[differences != 0]
    found, n = abs(float(ranks @ np.sign(differences[differences != 0]))), len(ranks)
    if n > 15:
        return float(2 * special.ndtr(-found / math.sqrt(float(ranks @ ranks))))
    flips = (np.arange(2**n)[:, None] >> np.arange(n)) % 2 * 2 - 1
    return float(np.mean(np.abs(flips @ ranks) >= found - 1e-9))


def kendall(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float | None:
    """Kendall's rank correlation (tau-b, which allows for ties) of (n,) and (n,); None below two values, or where either has
    but one value."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.kendalltau(a, b).statistic)  # pyright: ignore[reportAttributeAccessIssue]
