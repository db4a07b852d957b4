"""Heads in closed form are what scikit-learn and their definitions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeCV
from torch import Tensor, nn

from frostline import closedform as module
from frostline.closedform import PENALTIES, SCALES, Centred, lda, pooled, pooled_width, ridge, ridge_path, shrinkage
from frostline.metrics import scores


def problem(n: int, features: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs with a mean and unequal scales, and one-hot targets that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, features, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.linspace(0.1, 3, features, dtype=torch.float64) + 5
    noise = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = (inputs[:, :classes] + noise).argmax(dim=1)
    labels[:classes] = torch.arange(classes)
    return inputs, nn.functional.one_hot(labels, classes).double()


def mean_eigenvalue(inputs: Tensor) -> float:
    """Of their scatter, over those that can differ from zero."""
    return float(torch.linalg.svdvals(inputs - inputs.mean(dim=0)).square().mean())


SHAPES = [(60, 8, 3), (30, 30, 3), (31, 30, 3), (20, 45, 4)]  # more samples than features, as many, fewer


@pytest.mark.parametrize(("n", "features", "classes"), SHAPES)
def test_ridge_is_scikit_learns(n: int, features: int, classes: int) -> None:
    inputs, targets = problem(n, features, classes)
    unit = mean_eigenvalue(inputs)
    path = list(ridge_path(Centred(inputs), targets, PENALTIES))
    assert [found.strength for found in path] == list(PENALTIES)
    for found in path:
        theirs = Ridge(alpha=unit * found.strength, solver="svd").fit(inputs.numpy(), targets.numpy())
        np.testing.assert_allclose(found.weight.numpy(), theirs.coef_, atol=1e-8)
        np.testing.assert_allclose(found.bias.numpy(), theirs.intercept_, atol=1e-7)


@pytest.mark.parametrize(("n", "features", "classes"), SHAPES)
def test_left_out_predictions_are_those_of_refits(n: int, features: int, classes: int) -> None:
    inputs, targets = problem(n, features, classes, seed=1)
    unit = mean_eigenvalue(inputs)
    for found in ridge_path(Centred(inputs), targets, (1e-3, 1e-1, 10.0)):
        for one in range(n):
            rest = [other for other in range(n) if other != one]
            refit = Ridge(alpha=unit * found.strength, solver="svd").fit(inputs[rest].numpy(), targets[rest].numpy())
            np.testing.assert_allclose(found.left_out[one].numpy(), refit.predict(inputs[[one]].numpy())[0], atol=1e-7)


def test_many_regressions_at_a_time_are_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = problem(40, 12, 5)
    together = list(ridge_path(Centred(inputs), targets, PENALTIES))
    monkeypatch.setattr(module, "COLUMNS", 1)
    for one, other in zip(ridge_path(Centred(inputs), targets, PENALTIES), together, strict=True):
        np.testing.assert_allclose(one.weight.numpy(), other.weight.numpy(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one.left_out.numpy(), other.left_out.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [60, 8])
def test_numbers_have_the_ridge_with_the_least_left_out_error(n: int) -> None:
    inputs, _ = problem(n, 20, 3)
    labels = (inputs[:, :1] * 3 + torch.randn(n, 1, generator=torch.Generator().manual_seed(0)).double() / 2).float()
    head = ridge(inputs, labels, 1, "regression")
    unit = mean_eigenvalue(inputs)
    theirs = RidgeCV(alphas=[unit * strength for strength in PENALTIES]).fit(inputs.numpy(), labels.double().numpy())
    assert unit * head.strength == pytest.approx(theirs.alpha_)
    np.testing.assert_allclose(head(inputs).numpy()[:, 0], theirs.predict(inputs.numpy()).ravel(), atol=1e-6)


def test_several_labels_have_logits_that_are_0_where_the_ridge_says_one_half() -> None:
    inputs, targets = problem(80, 10, 3)
    labels = ((targets + targets.roll(1, dims=1) * (inputs[:, :1] > 0)) > 0.5).float()
    head = ridge(inputs, labels, 3, "multilabel")
    theirs = Ridge(alpha=head.strength * mean_eigenvalue(inputs), solver="svd").fit(inputs.numpy(), labels.numpy())
    logits, fit = head(inputs).numpy(), theirs.predict(inputs.numpy())
    scale = logits.std() / fit.std()
    assert any(scale == pytest.approx(each) for each in SCALES)
    np.testing.assert_allclose(logits, scale * (fit - 0.5), atol=1e-6)


@pytest.mark.parametrize(("n", "features", "classes"), SHAPES)
def test_the_ridge_head_has_the_lowest_left_out_nll(n: int, features: int, classes: int) -> None:
    inputs, targets = problem(n, features, classes, seed=2)
    labels = targets.argmax(dim=1)
    head = ridge(inputs, labels, classes)
    candidates = {
        (found.strength, scale): scores(scale * found.left_out.numpy(), labels.numpy())["nll"]
        for found in ridge_path(Centred(inputs), targets, PENALTIES)
        for scale in SCALES
    }
    strength, scale = min(candidates, key=candidates.__getitem__)
    theirs = Ridge(alpha=strength * mean_eigenvalue(inputs), solver="svd").fit(inputs.numpy(), targets.numpy())
    assert head.strength == strength
    np.testing.assert_allclose(head.weight.numpy(), scale * theirs.coef_, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(head(inputs).numpy(), scale * theirs.predict(inputs.numpy()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n", "features", "classes"), SHAPES)
def test_lda_is_scikit_learns(n: int, features: int, classes: int) -> None:
    inputs, targets = problem(n, features, classes, seed=3)
    labels = targets.argmax(dim=1)
    head = lda(inputs, labels, classes)
    theirs = LinearDiscriminantAnalysis(solver="eigen", shrinkage=head.strength).fit(inputs.numpy(), labels.numpy())
    ours = torch.softmax(head(inputs), dim=1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(inputs.numpy()), atol=1e-6)


@pytest.mark.parametrize(("n", "features", "classes"), SHAPES)
def test_shrinkage_is_ledoit_and_wolfs(n: int, features: int, classes: int) -> None:
    inputs, _ = problem(n, features, classes, seed=4)
    residuals = inputs - inputs.mean(dim=0)
    found = shrinkage(residuals, residuals.T @ residuals / n)
    assert 0 < found < 1
    assert found == pytest.approx(ledoit_wolf_shrinkage(residuals.numpy(), assume_centered=True), rel=1e-9)


@pytest.mark.parametrize("inputs", [torch.ones(6, 4), torch.zeros(6, 4), torch.full((6, 4), 1e-8)])
@pytest.mark.parametrize("fit", [ridge, lda])
def test_features_that_say_nothing_give_the_shares_of_the_classes(fit, inputs: Tensor) -> None:
    head = fit(inputs, torch.tensor([0, 1, 1, 2, 1, 0]), 3)
    logits = head(inputs)
    assert torch.isfinite(head.weight).all()
    np.testing.assert_allclose(logits.numpy(), logits[:1].expand_as(logits).numpy(), atol=1e-6)
    assert logits[0].argmax() == 1


@pytest.mark.parametrize(
    ("shape", "width"), [((24,), 24), ((8, 5, 5), 8), ((5, 5, 8), 8), ((8, 8, 8), 8), ((17, 12), 12), ((3, 4, 6), 3)]
)
def test_activations_are_averaged_over_positions(shape: tuple[int, ...], width: int) -> None:
    activations = torch.rand(2, *shape)
    found = pooled(activations)
    assert found.shape == (2, width)
    assert pooled_width(shape) == width
    assert torch.allclose(found.mean(dim=1), activations.flatten(1).mean(dim=1))
