"""Statistics, held to what others publish and compute, and by simulation to what they claim."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from frostline import stats

DEMSAR = np.array(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],  # 0.975 twice in print, and ranked 2 and 3
        [0.957, 0.978, 0.946, 0.970],
    ]
)
"""Demsar (2006), table 6: AUC of C4.5, C4.5+m, C4.5+cf, C4.5+m+cf on 14 data sets."""

scores = st.floats(0, 1).map(lambda value: round(value, 6))


def draws(seed: int, *size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size)


def test_demsar_2006() -> None:
    assert stats.mean_ranks(DEMSAR) == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    chi_square, p = stats.friedman(DEMSAR)
    assert chi_square == pytest.approx(9.28, abs=5e-3)
    assert p == pytest.approx(scipy.stats.chi2.sf(chi_square, 3))
    assert stats.critical_difference(14, 4) == pytest.approx(1.25, abs=5e-3)
    # section 3.1.3: C4.5 against C4.5+m, R+ = 93 and R- = 12, significant at 0.05
    assert 0.005 < stats.signed_rank_p(DEMSAR[:, 1] - DEMSAR[:, 0]) < 0.05


def test_critical_differences_are_those_of_the_printed_table() -> None:
    """Demsar (2006), table 5: q at 0.05 for 2 to 10 classifiers."""
    printed = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    found = [stats.critical_difference(6, k) / math.sqrt(k * (k + 1) / 36) for k in range(2, 11)]
    assert found == pytest.approx(printed, abs=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_agreement_with_scipy_and_statsmodels_on_random_tables(seed: int) -> None:
    table = draws(seed, 9, 4)
    chi_square, p = stats.friedman(table)
    assert (chi_square, p) == pytest.approx(tuple(scipy.stats.friedmanchisquare(*table.T)))
    difference = table[:, 0] - table[:, 1]
    assert stats.signed_rank_p(difference) == pytest.approx(scipy.stats.wilcoxon(difference, method="exact").pvalue)
    found = stats.mean_interval(difference)
    assert (found.low, found.high) == pytest.approx(DescrStatsW(difference).tconfint_mean())
    assert found.mean == pytest.approx(difference.mean())
    assert stats.paired_p(difference) == pytest.approx(scipy.stats.ttest_rel(table[:, 0], table[:, 1]).pvalue)
    assert stats.iqm(table) == pytest.approx(scipy.stats.trim_mean(table, 0.25, axis=None))
    assert stats.iqm(table) == pytest.approx(np.sort(table.ravel())[9:27].mean())


def test_signed_ranks_with_zeros_and_ties() -> None:
    differences = np.array([0, 0, 1, 1, 2, -1, 3, 3, 0.5, 4])
    method = scipy.stats.PermutationMethod(n_resamples=100_000)
    wanted = scipy.stats.wilcoxon(differences, zero_method="zsplit", method=method).pvalue
    assert stats.signed_rank_p(differences) == pytest.approx(wanted)
    assert stats.signed_rank_p(np.zeros(4)) == 1.0
    assert stats.signed_rank_p(np.arange(1, 6)) == 2**-4
    many = draws(0, 60) + 0.3
    assert stats.signed_rank_p(many) == pytest.approx(
        scipy.stats.wilcoxon(many, correction=False, method="asymptotic").pvalue
    )


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_holm_is_statsmodels(size: int) -> None:
    p_values = (np.random.default_rng(size).random(size) ** 3).round(2).tolist()
    assert stats.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lowers_nothing(p_values: list[float]) -> None:
    adjusted = stats.holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))
    assert sorted(adjusted) == [adjusted[index] for index in np.argsort(p_values, kind="stable")]
    assert min(adjusted) == min(1.0, len(p_values) * min(p_values))


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_test_less_half_the_observed_table(only_a: int, only_b: int) -> None:
    found = stats.mcnemar(only_a, only_b)
    assert found == stats.mcnemar(only_b, only_a)
    if only_a == only_b:
        assert found == pytest.approx(1.0)
    else:
        exact = statsmodels_mcnemar([[50, only_a], [only_b, 50]], exact=True).pvalue
        observed = scipy.stats.binom.pmf(min(only_a, only_b), only_a + only_b, 0.5)
        assert found == pytest.approx(exact - observed)


def test_the_interval_needs_two_values_that_differ() -> None:
    assert stats.mean_interval([]) == stats.Interval(0, None, None, None)
    assert stats.mean_interval([0.5]) == stats.Interval(1, 0.5, None, None)
    same = stats.mean_interval([0.1 + 0.2, 0.3, 0.3])
    assert (same.n, same.low, same.high) == (3, None, None)
    assert stats.mean_interval([0.1, 0.2], overlap=1.0).low is None


def test_equal_differences_are_judged_by_their_signs() -> None:
    assert stats.paired_p([0.1]) is None
    assert stats.paired_p([0.0, 0.0, 0.0]) == 1.0
    assert stats.paired_p(np.array([0.94, 0.84, 0.74]) - np.array([0.9, 0.8, 0.7])) == 0.25
    assert stats.paired_p([0.3] * 7) == 2**-6


@given(st.lists(st.tuples(st.none() | scores, st.none() | scores), min_size=1, max_size=9))
def test_superiority_is_a_share_that_adds_up(pairs: list[tuple[float | None, float | None]]) -> None:
    a, b = zip(*pairs, strict=True)
    assert stats.superiority(a, b) + stats.superiority(b, a) == pytest.approx(1)
    cubed = [[None if score is None else score**3 - 2 for score in each] for each in (a, b)]
    assert stats.superiority(*cubed) == stats.superiority(a, b)
    assert stats.superiority(a, [None] * len(a)) >= 0.5


def test_a_combined_p_value_holds_whatever_the_seeds_share() -> None:
    """At level 0.05: one test repeated five times, independent tests, and half and half."""
    uniform, rng = np.random.default_rng(0).random((4000, 5)), np.random.default_rng(1)
    for same in (0, 3, 5):
        mixed = uniform.copy()
        mixed[:, :same] = rng.random((4000, 1))
        assert np.mean([stats.combined_p(row.tolist()) <= 0.05 for row in mixed]) <= 0.05
    assert stats.combined_p([0.04]) == 0.04
    assert stats.combined_p([0.5, 0.008, 0.02, 0.9, 0.03]) == pytest.approx(0.03 * 5 / 3)


def test_the_calibration_error_by_hand() -> None:
    assert stats.calibration_error(np.array([0.6, 0.6, 0.9, 0.9]), np.array([1, 0, 1, 1]), bins=2) == pytest.approx(0.1)
    assert stats.calibration_error(np.ones(10), np.ones(10, bool)) == 0
    assert stats.calibration_error(np.array([0.7]), np.array([False])) == pytest.approx(0.7)


@pytest.mark.parametrize("n", [200, 2000])
def test_the_interval_over_samples_is_scipys_bootstrap(n: int) -> None:
    gaps = np.random.default_rng(n).choice([-1.0, -0.2, 0.0, 0.4, 1.0], n, p=[0.05, 0.1, 0.6, 0.15, 0.1])
    found = stats.samples_interval(gaps)
    theirs = scipy.stats.bootstrap((gaps,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert (found.n, found.mean) == (n, pytest.approx(gaps.mean()))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.15 * (theirs.high - theirs.low))


def test_the_interval_over_samples_covers() -> None:
    """95 % within 3 standard errors of 1,000 test sets."""
    rng, p = np.random.default_rng(0), [0.08, 0.8, 0.12]
    made = [stats.samples_interval(rng.choice([-1.0, 0.0, 1.0], 300, p=p)) for _ in range(1000)]
    covered = np.mean([found.low <= 0.04 <= found.high for found in made])  # pyright: ignore[reportOptionalOperand]
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 1000))


def test_samples_that_say_nothing_give_no_interval() -> None:
    assert stats.samples_interval(np.array([])) == stats.Interval(0, None, None, None)
    assert stats.samples_interval(np.array([0.5])) == stats.Interval(1, 0.5, None, None)
    assert stats.samples_interval(np.zeros(9)) == stats.Interval(9, 0.0, None, None)


def test_the_calibration_error_against_a_loop_over_bins() -> None:
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(600), rng.random(600) < 0.6
    order = np.argsort(confidence)
    wanted = sum(
        abs(confidence[part].mean() - correct[part].mean()) * len(part) / 600 for part in np.array_split(order, 15)
    )
    assert stats.calibration_error(confidence, correct) == pytest.approx(wanted)


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=40), st.randoms())
def test_the_order_of_samples_does_not_change_the_calibration_error(pairs, random) -> None:
    shuffled = random.sample(pairs, len(pairs))
    first, second = ([np.array(each) for each in zip(*order, strict=True)] for order in (pairs, shuffled))
    assert stats.calibration_error(*first) == pytest.approx(stats.calibration_error(*second))
    assert 0 <= stats.calibration_error(*first) <= 1


def test_the_stated_bias_of_the_calibration_error() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        confidence = rng.uniform(0.85, 1, 300)
        found.append(stats.calibration_error(confidence, rng.random(300) < confidence))
    assert fmean(found) == pytest.approx(0.8 * math.sqrt(15 * 0.925 * 0.075 / 300), rel=0.1)


@given(st.lists(scores, min_size=1, max_size=8))
def test_the_expected_best_is_the_mean_over_all_subsets(values: list[float]) -> None:
    budgets = list(range(1, len(values) + 1))
    wanted = [fmean(map(max, itertools.combinations(values, n))) for n in budgets]
    assert stats.expected_best(values, budgets) == pytest.approx(wanted)


def test_the_expected_best_is_unbiased_and_dodges_is_not() -> None:
    """The best of n uniform scores is n / (n + 1) on average, whatever B is."""
    total, budgets = 12, np.array([1, 2, 4, 6])
    draws = np.random.default_rng(0).random((20_000, total))
    found = np.array([stats.expected_best(row, budgets) for row in draws])
    error = found.std(axis=0) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - budgets / (budgets + 1)) < 4 * error)
    ends = np.arange(total + 1) / total
    dodge = (np.sort(draws) @ np.diff(ends**6)).mean()
    assert dodge < 6 / 7 - 10 * error[-1], "drawing with replacement is biased low"


def test_the_expected_best_of_many_trials_is_finite_and_rises() -> None:
    values = np.random.default_rng(0).random(100_000)
    found = stats.expected_best(values, [1, 10, 1000, 50_000])
    assert found[0] == pytest.approx(values.mean())
    assert np.all(np.diff(found) > 0)
    assert found[1] == pytest.approx(10 / 11, abs=0.01)
    assert found[-1] <= values.max() + 1e-9


points = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=7)


@given(points)
def test_a_point_is_dominated_by_one_that_is_better_in_one_and_not_worse_in_the_other(pairs) -> None:
    score, cost = np.array(pairs, float).T
    wanted = [
        not any(s >= score[k] and c <= cost[k] and (s > score[k] or c < cost[k]) for s, c in pairs)
        for k in range(len(pairs))
    ]
    assert stats.non_dominated(score, cost).tolist() == wanted
    assert any(wanted)


def test_shares_of_bootstrap_replicates() -> None:
    costs = np.array([[1.0] * 5, [2.0] * 5, [3.0] * 5])
    clear = np.array([[0.5] * 5, [0.9] * 5, [0.7] * 5])
    assert stats.front_shares(clear, costs).tolist() == [1, 1, 0]
    # the dearer of two is on the front where its mean is higher: as often as 5 draws of these differences have a sum above 0
    close = np.array([[0.8] * 5, [0.81, 0.82, 0.79, 0.81, 0.78]])
    differences = np.array([1, 2, -1, 1, -2])
    wanted = np.mean([sum(each) > 0 for each in itertools.product(differences, repeat=5)])
    assert stats.front_shares(close, costs[:2], 20_000)[1] == pytest.approx(wanted, abs=0.02)


def test_failed_seeds_and_unknown_costs_on_the_front() -> None:
    scores = np.array([[0.9, np.nan], [0.5, 0.5], [np.nan, np.nan]])
    shares = stats.front_shares(scores, np.ones((3, 2)))
    assert shares[2] == 0
    assert shares[0] == pytest.approx(0.75, abs=0.05), (
        "where the failed seed alone is drawn, nothing is known of the first"
    )
    assert shares[0] + shares[1] == pytest.approx(1)
    assert stats.non_dominated(np.array([0.5, 0.9]), np.array([1, np.nan])).tolist() == [True, False]


def test_the_interquartile_interval_is_that_of_a_stratified_bootstrap() -> None:
    """Rliable's (StratifiedBootstrap over runs within tasks, percentiles of the trimmed mean), written out as a loop."""
    table = np.random.default_rng(3).random((4, 6))
    rng, found = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = np.stack([task[rng.integers(6, size=6)] for task in table])
        found.append(scipy.stats.trim_mean(drawn, 0.25, axis=None))
    assert stats.iqm_interval(table, 20_000) == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])), abs=0.01)
    low, high = stats.iqm_interval(table)
    assert low < stats.iqm(table) < high


def covered(found: stats.Interval, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


@pytest.mark.parametrize(("seeds", "discrete"), [(3, False), (5, False), (5, True), (20, True)])
def test_coverage_over_independent_seeds(seeds: int, discrete: bool) -> None:
    """95 % within 3 standard errors of 2,000 studies; accuracies of 500 samples are discrete."""
    rng = np.random.default_rng(seeds)
    made = rng.binomial(500, 0.9, (2000, seeds)) / 500 if discrete else rng.normal(0.9, 0.01, (2000, seeds))
    hits = [covered(found, 0.9) for row in made if (found := stats.mean_interval(row)).low is not None]
    assert len(hits) > 1980
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def subset_scores(studies: int, pool: int, size: int, seeds: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """(studies, seeds) scores that are means over a subset of a pool, plus noise, and the (studies,) means over the whole
    pool. Over pools the mean is 0."""
    rng = np.random.default_rng(size)
    worth = rng.normal(size=(studies, pool))
    order = rng.random((studies, seeds, pool)).argsort(axis=2)[:, :, :size]
    means = np.take_along_axis(worth[:, None, :], order, axis=2).mean(axis=2)
    return means + noise * rng.normal(size=means.shape), worth.mean(axis=1)


@pytest.mark.parametrize("size", [5, 20, 32])
def test_coverage_with_overlapping_train_subsets(size: int) -> None:
    """Of 40 samples; 2,000 pools, 5 seeds each. For the pool at hand the plain interval covers 95 %, however much subsets
    overlap. For other pools it does not, and the corrected one does: exactly where the subset is all that varies, by more
    where seeds add noise."""
    made, of_pool = subset_scores(2000, 40, size, 5, noise=0.0)
    plain = [stats.mean_interval(row) for row in made]
    assert np.mean([covered(*each) for each in zip(plain, of_pool, strict=True)]) == pytest.approx(0.95, abs=0.015)
    corrected = [stats.mean_interval(row, size / 40) for row in made]
    assert np.mean([covered(each, 0) for each in corrected]) == pytest.approx(0.95, abs=0.015)
    undercovered = {5: 0.91, 20: 0.70, 32: 0.45}
    assert np.mean([covered(each, 0) for each in plain]) < undercovered[size] + 0.02
    noisy, _ = subset_scores(2000, 40, size, 5, noise=0.5)
    assert np.mean([covered(stats.mean_interval(row, size / 40), 0) for row in noisy]) >= 0.95


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_coverage_of_real_classifiers_on_overlapping_subsets(share: float) -> None:
    """Ridge classifiers, 10 features, pools of 80 drawn 1,000 times, one test set of 400: a learner is no mean, and the
    corrected interval covers the mean over pools all the same."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=10)

    def data(n: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.normal(size=(n, 10))
        return x, np.where(x @ direction + 2.5 * rng.normal(size=n) > 0, 1.0, -1.0)

    test_x, test_y = data(400)
    size, found = round(80 * share), []
    for _ in range(1000):
        x, y = data(80)
        row = []
        for _ in range(5):
            chosen = rng.permutation(80)[:size]
            gram = x[chosen].T @ x[chosen] + np.eye(10)
            row.append(np.mean(np.sign(test_x @ np.linalg.solve(gram, x[chosen].T @ y[chosen])) == test_y))
        found.append(row)
    truth = np.mean(found)
    corrected = np.mean([covered(stats.mean_interval(row, share), truth) for row in found])
    plain = np.mean([covered(stats.mean_interval(row), truth) for row in found])
    assert corrected >= 0.935
    assert plain < 0.9


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=0, max_size=12))
def test_kendalls_tau_counts_pairs(values: list[tuple[int, int]]) -> None:
    a, b = ([pair[place] for pair in values] for place in (0, 1))
    pairs = [(np.sign(x[0] - y[0]), np.sign(x[1] - y[1])) for x, y in itertools.combinations(values, 2)]
    untied = sum(left != 0 for left, _ in pairs) * sum(right != 0 for _, right in pairs)
    found = stats.kendall(a, b)
    if untied == 0:
        assert found is None
    else:
        assert found == pytest.approx(sum(left * right for left, right in pairs) / math.sqrt(untied))
