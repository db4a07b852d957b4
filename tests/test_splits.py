from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from frostline.files import DataError
from frostline.splits import joined, split


@st.composite
def problems(draw):
    """Labels in random order, shares that leave something for train, and a seed."""
    sizes = draw(st.lists(st.integers(3, 60), min_size=1, max_size=6))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    draw(st.randoms(use_true_random=False)).shuffle(labels)
    val, test = draw(st.floats(0.01, 0.9)), draw(st.sampled_from([0.0, 0.05, 0.15, 0.3]))
    assume(val + test < 0.99)
    return labels, val, test, draw(st.integers(0, 2**31 - 1))


@settings(deadline=None, max_examples=200)
@given(problems())
@example((np.zeros(3, np.int64), 0.9, 0.05, 0))
def test_without_groups_each_class_has_its_share_everywhere(problem):
    labels, val, test, seed = problem
    assigned = split(labels, None, val=val, test=test, seed=seed)
    shares = {name: share for name, share in (("train", 1 - val - test), ("val", val), ("test", test)) if share}
    assert set(assigned) <= set(shares)
    assert assigned.shape == labels.shape
    for label, count in Counter(labels.tolist()).items():
        got = Counter(assigned[labels == label].tolist())
        assert set(got) == set(shares)
        if min(share * count for share in shares.values()) >= 1:
            for name, share in shares.items():
                assert abs(got[name] - share * count) <= 1 + 1e-6


@given(problems())
@settings(deadline=None, max_examples=50)
def test_a_seed_determines_the_split(problem):
    labels, val, test, seed = problem
    once, again = (split(labels, None, val=val, test=test, seed=seed) for _ in range(2))
    assert once.tolist() == again.tolist()


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_group_crosses_and_every_class_is_everywhere(data):
    """Groups of one class each: any sizes, at least three a class."""
    labels, groups = [], []
    for label in range(data.draw(st.integers(1, 4))):
        for size in data.draw(st.lists(st.integers(1, 20), min_size=3, max_size=8)):
            groups += [max(groups, default=-1) + 1] * size
            labels += [label] * size
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(len(labels))
    labels, groups = np.array(labels)[order], np.array(groups)[order]
    assigned = split(labels, groups, val=0.15, test=0.15, seed=data.draw(st.integers(0, 2**31 - 1)))
    for group in np.unique(groups):
        assert len(set(assigned[groups == group])) == 1
    for label in np.unique(labels):
        assert set(assigned[labels == label]) == {"train", "val", "test"}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 11)), min_size=10, max_size=80), st.integers(0, 99))
def test_groups_of_several_classes_never_cross_or_are_refused(samples, seed):
    labels, groups = (np.array(column) for column in zip(*samples, strict=True))
    try:
        assigned = split(labels, groups, val=0.2, test=0.2, seed=seed)
    except DataError:
        return
    for group in np.unique(groups):
        assert len(set(assigned[groups == group])) == 1
    for label in np.unique(labels):
        assert set(assigned[labels == label]) == {"train", "val", "test"}


def test_the_split_of_a_seed_is_pinned():
    assigned = split(np.arange(20) % 2, None, val=0.2, test=0.2, seed=7)
    assert "".join(name[1] for name in assigned) == PINNED
    assert Counter(assigned.tolist()) == {"train": 12, "val": 4, "test": 4}
    assert assigned.tolist() != split(np.arange(20) % 2, None, val=0.2, test=0.2, seed=8).tolist()


PINNED = "earrrrrearrrrrrreaae"  # second letters of train, val, test


def test_rounding_cancels_out_over_the_classes():
    labels = np.repeat(np.arange(100), 10)  # 1.5 samples of each class are due to val and to test
    got = Counter(split(labels, None, val=0.15, test=0.15, seed=0).tolist())
    assert got == {"train": 700, "val": 150, "test": 150}


def test_group_sizes_are_balanced():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 20, 60))
    labels = groups % 3
    assigned = split(labels, groups, val=0.2, test=0.2, seed=0)
    for label in range(3):
        mine = assigned[labels == label]
        for name in ("val", "test"):
            assert abs(np.mean(mine == name) - 0.2) < 0.04


def test_val_alone_can_be_carved_out():
    got = Counter(split(np.zeros(100, np.int64), None, val=0.15, test=0, seed=0).tolist())
    assert got == {"train": 85, "val": 15}


def test_a_class_too_small_is_named_with_its_count():
    labels = np.array([0] * 9 + [1] * 2)
    with pytest.raises(DataError, match=r"class 'dog' has 2 sample\(s\), fewer than the 3 splits .*train, val, test"):
        split(labels, None, val=0.1, test=0.1, seed=0, classes=("cat", "dog"))
    with pytest.raises(DataError, match=r"class 0 has 9 sample\(s\) in 2 group\(s\)"):
        split(labels, np.array([0] * 5 + [1] * 4 + [2, 3]), val=0.1, test=0.1, seed=0)
    assert set(split(labels, None, val=0.1, test=0, seed=0)) == {"train", "val"}


def test_groups_that_tie_classes_together_can_make_it_impossible():
    fano = [
        (0, 1, 2),
        (0, 3, 4),
        (0, 5, 6),
        (1, 3, 5),
        (1, 4, 6),
        (2, 3, 6),
        (2, 4, 5),
    ]  # no three-colouring of its lines
    labels = np.repeat(np.arange(7), 3)
    with pytest.raises(DataError, match=r"class \d cannot be in (train|val|test).*hold other classes too"):
        split(labels, np.array(fano).ravel(), val=0.3, test=0.3, seed=0)


def test_joined_follows_chains():
    groups = np.array(["a", "a", "b", "c", "d"])
    contents = np.array([1, 2, 2, 3, 3])
    units = joined(groups, contents)
    assert units.dtype == np.int64
    assert [units.tolist().index(unit) for unit in units] == [0, 0, 0, 3, 3]
    assert len(set(joined(contents).tolist())) == 3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_samples_that_share_a_value_are_joined(pairs):
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    units = joined(first, second)
    for key in (first, second):
        for value in np.unique(key):
            assert len(set(units[key == value].tolist())) == 1
    assert len(set(units.tolist())) <= min(len(np.unique(first)), len(np.unique(second)))
