"""Two arms on paired seeds: what is called better, and how often when nothing is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from frostline.arms import Answers
from frostline.pairs import Pair, compare_pairs
from frostline.spec import Mode

Scores = dict[int, float | None]


def said(*rows: np.ndarray) -> dict[int, Answers]:
    return {seed: Answers("same", np.asarray(row, bool), np.ones(len(row))) for seed, row in enumerate(rows)}


def one(
    a: Scores, b: Scores, mode: Mode = "max", answers: dict[str, dict[int, Answers]] | None = None, overlap: float = 0.0
) -> Pair:
    (pair,) = compare_pairs({"a": a, "b": b}, answers or {}, mode, overlap)
    return pair


GOOD: Scores = {0: 0.90, 1: 0.91, 2: 0.93, 3: 0.92, 4: 0.90}
BAD: Scores = {0: 0.80, 1: 0.82, 2: 0.82, 3: 0.83, 4: 0.79}
CLEAR = {"a": said(*[np.arange(100) < 90] * 5), "b": said(*[np.arange(100) < 60] * 5)}


def test_a_pair_by_hand() -> None:
    pair = one(GOOD, BAD, answers=CLEAR)
    assert (pair.a, pair.b, pair.verdict, pair.reason) == ("a", "b", "better", None)
    assert pair.difference.n == 5
    assert pair.difference.mean == pytest.approx(0.1)
    assert pair.difference.low == pytest.approx(0.1 - 2.776445 * 0.01 / 5**0.5, abs=1e-6)
    assert pair.p == pair.p_holm == pytest.approx(stats.ttest_1samp([0.10, 0.09, 0.11, 0.09, 0.11], 0).pvalue)
    assert pair.superiority == 1.0
    assert [(test["only_a"], test["only_b"]) for test in pair.mcnemar] == [(30, 0)] * 5
    assert pair.mcnemar_p == pytest.approx(0.5**30 * 5 / 3, rel=1e-6)


def test_the_better_one_comes_first_in_either_direction() -> None:
    swapped = one(BAD, GOOD, answers={"a": CLEAR["b"], "b": CLEAR["a"]})
    assert (swapped.a, swapped.b, swapped.verdict) == ("b", "a", "better")
    assert swapped.difference.mean == pytest.approx(0.1)
    lower = one(GOOD, BAD, mode="min", answers={"a": CLEAR["b"], "b": CLEAR["a"]})
    assert (lower.a, lower.b, lower.verdict) == ("b", "a", "better")
    assert lower.difference.mean == pytest.approx(-0.1)
    assert lower.superiority == 1.0


def test_seeds_may_tell_apart_what_test_samples_do_not() -> None:
    close = {"a": said(*[np.arange(100) < 90] * 5), "b": said(*[np.arange(100) < 88] * 5)}
    assert one(GOOD, BAD, answers=close).verdict == "better here"
    against = {"a": CLEAR["b"], "b": CLEAR["a"]}
    assert one(GOOD, BAD, answers=against).verdict == "better here", "McNemar speaks for the other one"
    none = one(GOOD, BAD)
    assert (none.verdict, none.mcnemar_p, none.reason) == (
        "better here",
        None,
        "no predictions of the same test samples",
    )


def test_no_verdict_without_two_seeds_in_common() -> None:
    assert one({0: 0.9}, {0: 0.1}).verdict == "not compared"
    assert "two are needed" in str(one({0: 0.9}, {0: 0.1}).reason)
    apart = one({0: 0.9, 1: 0.9}, {5: 0.1, 6: 0.2})
    assert (apart.verdict, apart.difference.n, apart.superiority) == ("not compared", 0, None)
    assert one(GOOD, dict.fromkeys(GOOD)).verdict == "not compared"
    assert one(GOOD, dict.fromkeys(GOOD)).superiority == 1.0


def test_equal_scores_and_equal_differences() -> None:
    same = one(GOOD, GOOD)
    assert (same.verdict, same.p, same.superiority, same.reason) == ("not distinguishable", 1.0, 0.5, None)
    shifted: Scores = {seed: score - 0.05 for seed, score in GOOD.items() if score}
    constant = one(GOOD, shifted, answers=CLEAR)
    assert (constant.verdict, constant.p, constant.difference.low) == ("not distinguishable", 0.0625, None)
    assert "no spread to judge by" in str(constant.reason)


def test_a_failure_counts_as_worst() -> None:
    """An arm with failed confirmations is never called better, and loses those seeds; that its rival's failed does not save it."""
    limping: Scores = {**GOOD, 4: None}
    pair = one(limping, BAD, answers=CLEAR)
    assert (pair.verdict, pair.difference.n, pair.superiority) == ("not distinguishable", 4, 0.8)
    assert pair.p_holm is not None
    assert pair.p_holm < 0.05
    assert "1 of its confirmations failed" in str(pair.reason)
    assert one(GOOD, {**BAD, 4: None}, answers=CLEAR).verdict == "better"


def test_the_difference_may_be_bound_to_the_pool() -> None:
    assert not one(GOOD, BAD, answers=CLEAR, overlap=0.2).pool_bound
    wide = one(GOOD, BAD, answers=CLEAR, overlap=0.99)
    assert wide.verdict == "better"
    assert wide.pool_bound
    whole = one(GOOD, BAD, answers=CLEAR, overlap=1.0)
    assert (whole.other_pools.low, whole.pool_bound) == (None, False)


def test_p_values_are_adjusted_for_all_pairs() -> None:
    middle: Scores = {0: 0.88, 1: 0.92, 2: 0.90, 3: 0.91, 4: 0.90}
    pairs = compare_pairs({"a": GOOD, "m": middle, "b": BAD}, {}, "max", 0.0)
    assert [(pair.a, pair.b) for pair in pairs] == [("a", "m"), ("a", "b"), ("m", "b")]
    least = min(pairs, key=lambda pair: pair.p or 1)
    assert least.p_holm == pytest.approx(3 * (least.p or 0))
    assert pairs[0].p_holm == pairs[0].p


def equal_arms(studies: int, *, samples_differ: bool, seed: int, n_test: int = 300, pool: int = 60, size: int = 30):
    """Studies of three equal arms, 5 paired seeds: scores and answers by arm and seed.

    Each seed draws 30 of 60 train samples, half of which any two have in common; which ones moves an arm, but not on average over
    the pool. Most test samples are answered alike by all seeds. With `samples_differ` each arm finds other samples easy: the arms
    are equal on average over test samples, and not on those at hand.
    """
    rng = np.random.default_rng(seed)
    for _ in range(studies):
        hard = rng.normal(3, 4, n_test)
        worth = rng.normal(0, 2, (3, pool))
        worth += rng.normal(0, 2, pool) - worth.mean(axis=1, keepdims=True)
        own = rng.normal(0, 2 * samples_differ, (3, n_test))
        subsets = [rng.permutation(pool)[:size] for _ in range(5)]
        scores: dict[str, Scores] = {}
        answers: dict[str, dict[int, Answers]] = {}
        for arm in range(3):
            shift = np.array([worth[arm, subset].mean() for subset in subsets]) + rng.normal(0, 0.2, 5)
            right = rng.random((5, n_test)) < 1 / (1 + np.exp(-(hard + own[arm] + shift[:, None])))
            scores[str(arm)] = dict(enumerate(right.mean(axis=1).tolist()))
            answers[str(arm)] = said(*right)
        yield scores, answers


def called(verdicts: tuple[str, ...], *, samples_differ: bool, seed: int) -> float:
    """The share of 2,000 studies in which any two of three equal arms are called different."""
    made = equal_arms(2000, samples_differ=samples_differ, seed=seed)
    return float(np.mean([any(pair.verdict in verdicts for pair in compare_pairs(*each, "max", 0.5)) for each in made]))


def test_of_2000_studies_with_equal_arms_few_are_called_distinguishable() -> None:
    assert called(("better", "better here"), samples_differ=False, seed=0) <= 0.065


def test_arms_that_differ_on_these_test_samples_alone_are_not_called_better() -> None:
    """They are told apart more often than by chance, truly for these samples."""
    assert called(("better",), samples_differ=True, seed=1) <= 0.065
    assert called(("better here",), samples_differ=True, seed=1) > 0.1
