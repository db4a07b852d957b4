"""LogME against the marginal likelihood itself, and the H-score against scikit-learn's shrinkage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf

from frostline.transferability import evidence, h_score, logme, spectrum_of

SHAPES = [(12, 40), (40, 12), (20, 20), (60, 3)]


def sample(n: int, dim: int, signal: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, dim) features and (n,) labels of three classes, whose means are `signal` apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    features = rng.normal(size=(n, dim)) + signal * rng.normal(size=(3, dim))[labels] + 0.5
    return torch.from_numpy(features), torch.from_numpy(labels)


def marginal(features: np.ndarray, target: np.ndarray, weights: float, noise: float) -> float:
    """log p(target) per sample, for weights and noise of these precisions, by the definition."""
    n = len(target)
    covariance = np.eye(n) / noise + features @ features.T / weights
    return float(multivariate_normal(np.zeros(n), covariance).logpdf(target)) / n


@pytest.mark.parametrize(("n", "dim"), SHAPES)
def test_the_evidence_is_the_marginal_likelihood(n: int, dim: int) -> None:
    features, labels = sample(n, dim)
    targets = torch.nn.functional.one_hot(labels, 3).double()
    parts = spectrum_of(features, targets)
    for ratio in (1e-3, 0.1, 3.0, 1e4):
        found = evidence(torch.tensor([ratio], dtype=torch.float64), *parts, n)[0]
        for label in range(3):
            target = targets[:, label].numpy()
            spread = np.eye(n) + features.numpy() @ features.numpy().T / ratio
            noise = n / float(target @ np.linalg.solve(spread, target))
            assert found[label] == pytest.approx(marginal(features.numpy(), target, ratio * noise, noise), rel=1e-8)
            for other in (0.8 * noise, 1.2 * noise):
                assert found[label] > marginal(features.numpy(), target, ratio * other, other)


@pytest.mark.parametrize(("n", "dim"), SHAPES)
@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_logme_is_the_greatest_marginal_likelihood(n: int, dim: int, signal: float) -> None:
    features, labels = sample(n, dim, signal)
    best = []
    for label in range(3):
        target = (labels == label).double().numpy()

        def loss(logs: np.ndarray, target: np.ndarray = target) -> float:
            return -marginal(features.numpy(), target, *np.exp(logs))

        bounds = [(-10.0, 20.0), (-3.0, 25.0)]
        runs = [
            minimize(loss, start, method="Nelder-Mead", bounds=bounds) for start in ((0, 1), (6, 2), (14, 2), (3, 12))
        ]
        best.append(max(-run.fun for run in runs))
    assert logme(features, labels, 3) == pytest.approx(np.mean(best), abs=2e-5)


def as_published(features: np.ndarray, target: np.ndarray, rounds: int = 11) -> float:
    """MacKay's fixed point with a determinant over the eigenvalues that an economical decomposition has: min(n, D) of them."""
    n, dim = features.shape
    left, singular, right = np.linalg.svd(features, full_matrices=False)
    spectrum, projected, weights, noise = singular**2, left.T @ target, 1.0, 1.0
    mean, misfit = np.zeros(dim), 0.0
    for _ in range(rounds):
        effective = float((noise * spectrum / (weights + noise * spectrum)).sum())
        mean = right.T @ (noise * singular * projected / (weights + noise * spectrum))
        misfit = float(((features @ mean - target) ** 2).sum())
        weights, noise = effective / (float(mean @ mean) + 1e-5), (n - effective) / (misfit + 1e-5)
    determinant = np.log(weights + noise * spectrum).sum()
    rest = dim * math.log(weights) + n * math.log(noise / (2 * math.pi)) - noise * misfit - weights * float(mean @ mean)
    return (rest - determinant) / 2 / n


@pytest.mark.parametrize("classes", [2, 10, 17])
def test_random_features_are_worth_nothing_though_there_be_more_of_them_than_samples(classes: int) -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(100, 1280)), rng.permutation(np.arange(100) % classes)
    shares = np.bincount(labels) / 100
    nothing = np.mean(-np.log(2 * math.pi * math.e * shares) / 2)  # what a regression without any weight has
    assert logme(torch.from_numpy(features), torch.from_numpy(labels), classes) == pytest.approx(nothing, abs=0.02)
    published = [as_published(features, (labels == label).astype(float)) for label in range(classes)]
    assert np.mean(published) > 40, "what is wrong with it must show, or this test says nothing"


@pytest.mark.parametrize(("n", "dim"), SHAPES)
def test_features_that_are_always_zero_change_nothing(n: int, dim: int) -> None:
    features, labels = sample(n, dim)
    padded = torch.cat([features, torch.zeros(n, 50, dtype=torch.float64)], dim=1)
    assert logme(padded, labels, 3) == pytest.approx(logme(features, labels, 3), abs=1e-6)
    assert logme(1000 * features, labels, 3) == pytest.approx(logme(features, labels, 3), abs=1e-6)


@pytest.mark.parametrize(("n", "dim"), SHAPES)
def test_the_h_score_is_that_of_the_shrunk_covariance(n: int, dim: int) -> None:
    features, labels = sample(n, dim)
    model = LedoitWolf().fit(features.numpy())
    means = np.stack([features.numpy()[labels.numpy() == label].mean(axis=0) for label in range(3)])
    between = np.cov(means[labels.numpy()].T, bias=True)
    expected = np.trace(np.linalg.solve(model.covariance_, (1 - model.shrinkage_) * between))
    assert h_score(features, labels, 3) == pytest.approx(expected, rel=1e-6)
    assert 0 <= h_score(features, labels, 3) <= 2


def test_both_prefer_features_that_tell_classes_apart() -> None:
    for score in (logme, h_score):
        found = [score(*sample(60, 20, signal), 3) for signal in (0.0, 0.5, 2.0)]
        assert found == sorted(found)
        assert found[2] > found[0] + 0.2


def test_constant_features_are_no_error() -> None:
    _, labels = sample(30, 5)
    for score in (logme, h_score):
        assert math.isfinite(score(torch.ones(30, 5, dtype=torch.float64), labels, 3))
        assert math.isfinite(score(torch.zeros(30, 40, dtype=torch.float64), labels, 3))
