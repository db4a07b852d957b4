"""Classifiers by distance: against scikit-learn on the same directions, and k against leaving each sample out in turn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from frostline.neighbours import NEIGHBOURS, directions, nearest_mean, nearest_neighbours


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pixels, labels = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    return pixels[:300], labels[:300].long(), pixels[300:600], labels[300:600].long()


def test_they_know_digits(digits: tuple[torch.Tensor, ...]) -> None:
    train, labels, val, truth = digits
    for fit, least in ((nearest_neighbours, 0.85), (nearest_mean, 0.75)):
        head = fit(train, labels, 10)
        assert head(val).shape == (300, 10)
        assert (head(val).argmax(dim=1) == truth).double().mean() > least


def test_k_is_the_one_that_is_right_most_often_when_each_is_left_out(digits: tuple[torch.Tensor, ...]) -> None:
    train, labels = digits[0][:60] + 8 * torch.randn(60, 64, generator=torch.Generator().manual_seed(1)), digits[1][:60]
    known, truth = directions(train), labels.numpy()
    right = {}
    for k in NEIGHBOURS:
        hits = [
            KNeighborsClassifier(k, algorithm="brute")
            .fit(np.delete(known, place, axis=0), np.delete(truth, place))
            .predict(known[[place]])[0]
            == truth[place]
            for place in range(60)
        ]
        right[k] = np.mean(hits)
    assert len(set(right.values())) > 2, right
    assert nearest_neighbours(train, labels, 10).strength == max(NEIGHBOURS, key=lambda k: (right[k], -k))


def test_few_samples_have_few_neighbours() -> None:
    features = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]])
    head = nearest_neighbours(features, torch.tensor([0, 0, 1, 1]), 2)
    assert head.strength == 1
    assert head(torch.tensor([[0.0, 3.0], [3.0, 0.0]])).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_the_nearest_mean_is_scikit_learns_on_directions(digits: tuple[torch.Tensor, ...]) -> None:
    train, labels, val, _ = digits
    train, val = train[:, 19:24], val[:, 19:24]  # of a few pixels, so that it errs
    other = NearestCentroid().fit(directions(train), labels.numpy()).predict(directions(val))
    assert (nearest_mean(train, labels, 10)(val).argmax(dim=1).numpy() == other).all()


def test_only_the_direction_counts(digits: tuple[torch.Tensor, ...]) -> None:
    train, labels, val, _ = digits
    stronger = torch.linspace(0.1, 10, 300)[:, None]
    for fit in (nearest_neighbours, nearest_mean):
        assert (fit(train, labels, 10)(val) == fit(stronger * train, labels, 10)(stronger * val)).all()


def test_many_classes_of_few_samples_are_no_error() -> None:
    features = torch.eye(60, dtype=torch.float64) + 0.1
    labels = torch.arange(60) // 2
    for fit in (nearest_neighbours, nearest_mean):
        assert fit(features, labels, 30)(features).shape == (60, 30)
    assert (nearest_mean(features, labels, 30)(features).argmax(dim=1) == labels).all()


def test_shares_of_the_nearest_are_scikit_learns(digits: tuple[torch.Tensor, ...]) -> None:
    train, labels, val, _ = digits
    noisy = train[:100] + 6 * torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    head = nearest_neighbours(noisy, labels[:100], 10)
    assert head.strength > 1
    other = KNeighborsClassifier(head.strength, algorithm="brute").fit(directions(noisy), labels[:100].numpy())
    np.testing.assert_allclose(head(val).numpy(), other.predict_proba(directions(val)))
