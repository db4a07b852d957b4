import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from scipy.special import expit, softmax
from scipy.stats import spearmanr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
    top_k_accuracy_score,
)

from frostline.metrics import probabilities, said_of, scores
from frostline.targets import EVERY, FURTHER, Target


def test_the_scores_of_a_table_worked_out_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.25, 0.25]], np.float32))
    found = scores(logits, np.array([0, 0, 1, 1]))
    assert tuple(found) == EVERY["classification"]
    assert found["accuracy"] == 3 / 4
    assert found["balanced_accuracy"] == (1 + 1 / 2) / 2
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2, abs=1e-15)  # class 2: in neither, left out
    assert found["nll"] == pytest.approx(-np.log([0.7, 0.6, 0.8, 0.25]).mean(), abs=1e-7)


# what scikit-learn warns of is just what is compared here
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@given(st.data(), st.integers(1, 40), st.integers(2, 7))
def test_scores_are_scikit_learns(data: st.DataObject, n: int, classes: int) -> None:
    logits = data.draw(hnp.arrays(np.float32, (n, classes), elements=st.floats(-10, 10, width=32)))
    seen = data.draw(st.lists(st.integers(0, classes - 1), min_size=1, unique=True))  # some classes have no label
    labels = np.array(data.draw(st.lists(st.sampled_from(seen), min_size=n, max_size=n)))
    predicted, found = logits.argmax(axis=1), scores(logits, labels)
    likely = softmax(logits.astype(np.float64), axis=1)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-12)
    assert found["nll"] == pytest.approx(log_loss(labels, likely, labels=range(classes)), abs=1e-9)
    assert all(type(value) is float for value in found.values())


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(2, 5)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.data(),
)
def test_extreme_logits_give_finite_scores(logits: np.ndarray, data: st.DataObject) -> None:
    labels = np.array(
        data.draw(st.lists(st.integers(0, logits.shape[1] - 1), min_size=len(logits), max_size=len(logits)))
    )
    assert all(np.isfinite(value) for value in scores(logits, labels).values())
    likely = probabilities(logits)
    assert likely.dtype == np.float32
    assert likely.shape == logits.shape
    np.testing.assert_allclose(likely.sum(axis=1), 1, atol=1e-6)


def test_confidently_wrong_costs_the_whole_difference() -> None:
    assert scores(np.array([[1e4, 0.0]], np.float32), np.array([1]))["nll"] == 1e4
    assert scores(np.array([[1e4, 0.0]], np.float32), np.array([0]))["nll"] == 0.0


def test_scores_do_not_see_a_shift_of_the_logits_and_nan_stays_nan() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
    assert scores(logits + 7, labels) == pytest.approx(scores(logits, labels), abs=1e-12)
    logits[3, 1] = np.nan
    assert np.isnan(scores(logits, labels)["nll"])


def test_many_classes_take_no_table_of_all_pairs() -> None:
    classes = 100_000  # a confusion matrix of them would be 80 GB
    logits = np.zeros((2, classes), np.float32)
    logits[0, 7] = logits[1, 8] = 50
    assert scores(logits, np.array([7, classes - 1]))["accuracy"] == 0.5


def test_probabilities_are_the_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    np.testing.assert_allclose(probabilities(logits), softmax(logits.astype(np.float64), axis=1), atol=1e-7)


@given(st.data(), st.integers(2, 8), st.integers(0, 30))
def test_further_scores_are_scikit_learns_where_it_has_them(data: st.DataObject, classes: int, more: int) -> None:
    labels = np.array(
        [*range(classes), *data.draw(st.lists(st.integers(0, classes - 1), min_size=more, max_size=more))]
    )
    logits = data.draw(
        hnp.arrays(np.float32, (len(labels), classes), elements=st.floats(-10, 10, width=32), unique=True)
    )
    likely, found = softmax(logits.astype(np.float64), axis=1), scores(logits, labels, *FURTHER["classification"])
    assert set(found) == {*EVERY["classification"], *FURTHER["classification"]}
    both = likely[:, 1] if classes == 2 else likely
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, both, multi_class="ovr"), abs=1e-9)
    top5 = top_k_accuracy_score(labels, logits, k=5, labels=range(classes)) if classes > 5 else 1.0
    assert found["top5_accuracy"] == pytest.approx(top5, abs=1e-12)
    truth = np.eye(classes)[labels]
    assert found["brier"] == pytest.approx(((likely - truth) ** 2).sum(axis=1).mean(), abs=1e-9)
    assert 0 <= found["ece"] <= 1
    assert all(type(value) is float for value in found.values())


def test_calibration_by_hand() -> None:
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]))
    assert scores(logits, np.array([0, 0, 1, 0]), "ece")["ece"] == pytest.approx(3 / 4 * abs(2 / 3 - 0.9) + 1 / 4 * 0.4)
    assert scores(np.array([[30.0, 0.0]]), np.array([0]), "ece")["ece"] == pytest.approx(0, abs=1e-9)


def test_an_area_needs_two_classes() -> None:
    assert np.isnan(scores(np.zeros((3, 2)), np.zeros(3, int), "auroc")["auroc"])


@given(st.data(), st.integers(2, 30), st.integers(2, 5))
def test_scores_of_several_labels_are_scikit_learns(data: st.DataObject, n: int, classes: int) -> None:
    labels = data.draw(hnp.arrays(np.float32, (n, classes), elements=st.sampled_from([0.0, 1.0])))
    labels[0], labels[1] = 0, 1  # each label is of some samples only
    values = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([-1.0, 0.5]))  # equal ones, too
    logits = data.draw(hnp.arrays(np.float32, (n, classes), elements=values))
    found = scores(logits, labels, *FURTHER["multilabel"], target=Target("multilabel"))
    assert set(found) == {*EVERY["multilabel"], *FURTHER["multilabel"]}
    likely, said = expit(logits.astype(np.float64)), logits > 0
    assert found["micro_f1"] == pytest.approx(f1_score(labels, said, average="micro"), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, said, average="macro", zero_division=0), abs=1e-12)
    assert found["exact_match"] == pytest.approx(accuracy_score(labels, said), abs=1e-12)
    each = [log_loss(labels[:, i], likely[:, i], labels=[0, 1]) for i in range(classes)]
    assert found["nll"] == pytest.approx(np.mean(each), abs=1e-9)
    expected = np.mean([average_precision_score(labels[:, i], logits[:, i]) for i in range(classes)])
    assert found["average_precision"] == pytest.approx(expected, abs=1e-9)
    expected = np.mean([roc_auc_score(labels[:, i], logits[:, i]) for i in range(classes)])
    assert found["auroc"] == pytest.approx(expected, abs=1e-9)
    assert found["brier"] == pytest.approx(((likely - labels) ** 2).mean(), abs=1e-12)
    assert all(type(value) is float for value in found.values())


def test_labels_that_nobody_has_count_for_nothing() -> None:
    none = np.zeros((3, 2), np.float32)
    found = scores(none - 1, none, *FURTHER["multilabel"], target=Target("multilabel"))
    assert (found["micro_f1"], found["macro_f1"], found["exact_match"]) == (1.0, 1.0, 1.0)
    assert np.isnan([found["auroc"], found["average_precision"]]).all()


@given(st.data(), st.integers(3, 30))
def test_scores_of_numbers_are_in_the_unit_of_the_data(data: st.DataObject, n: int) -> None:
    drawn = hnp.arrays(np.float32, (n, 1), elements=st.floats(-3, 3, width=32), unique=True)
    outputs, labels, target = data.draw(drawn), data.draw(drawn), Target("regression", 20.0, 0.5)
    found = scores(outputs, labels, *FURTHER["regression"], target=target)
    truth, said = 20 + labels[:, 0].astype(np.float64) / 2, 20 + outputs[:, 0].astype(np.float64) / 2
    assert set(found) == {*EVERY["regression"], *FURTHER["regression"]}
    assert found["rmse"] == pytest.approx(root_mean_squared_error(truth, said), rel=1e-9)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, said), rel=1e-9)
    assert found["r2"] == pytest.approx(r2_score(truth, said), rel=1e-6)
    assert found["spearman"] == pytest.approx(spearmanr(truth, said).statistic, abs=1e-9)


def test_what_does_not_vary_is_not_explained() -> None:
    found = scores(np.ones((3, 1)), np.ones((3, 1)), "spearman", target=Target("regression"))
    assert found["rmse"] == 0
    assert np.isnan([found["r2"], found["spearman"]]).all()


def test_what_outputs_say_depends_on_the_task() -> None:
    logits = np.array([[1.5, -2.0, 0.5], [-1.0, -2.0, -3.0]], np.float32)
    assert said_of(logits, "abc", "classification") == ["a", "a"]
    assert said_of(logits, "abc", "multilabel") == [("a", "c"), ()]
    assert said_of(logits[:, :1], ["angle"], "regression") == [1.5, -1.0]
    np.testing.assert_allclose(probabilities(logits, "multilabel"), expit(logits), atol=1e-7)
