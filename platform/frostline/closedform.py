"""Linear heads in closed form: ridge regression and linear discriminant analysis on pooled features. No learning rate, no
seed, one solution; they say in a second what a backbone's features are worth, and are where LP-FT starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from frostline.losses import mean_loss
from frostline.spec import Task

PENALTIES = tuple(10 ** (k / 2) for k in range(-8, 5))  # in mean eigenvalues of the features' scatter
COLUMNS = 256  # of all regressions that are solved at a time
SCALES = tuple(2.0**k for k in range(8))


class Centred:
    """(N, D) features less their mean, in float64, and what the heads in closed form have in common of them."""

    def __init__(self, features: Tensor) -> None:
        features = features.double()
        self.centre = features.mean(dim=0)
        self.rows = features - self.centre

    @cached_property
    def scatter(self) -> Tensor:
        """(D, D)."""
        return self.rows.T @ self.rows


@dataclass(frozen=True)
class LinearHead:
    """(N, D) features to (N, C) logits, in float64."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    strength: float
    """Of the regularisation: ridge's penalty in mean eigenvalues of the scatter, or LDA's shrinkage from 0 to 1."""

    def __call__(self, features: Tensor) -> Tensor:
        return features.to(self.weight) @ self.weight.T + self.bias


@dataclass(frozen=True)
class Ridge:
    """A ridge regression with an intercept that is not penalised."""

    strength: float
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    left_out: Tensor  # (N, C): what the fit to all other samples predicts for each


def ridge(features: Tensor | Centred, labels: Tensor, classes: int, task: Task = "classification") -> LinearHead:
    """Ridge regression of class indicators on (N, D) features, for (N,) labels below `classes`; or of (N, C) labels of 0 and 1, or of
    numbers, as `task` says.

    The penalty, and the scale that makes logits of its outputs (none where they are numbers), are those with the lowest leave-one-out
    loss, which is exact for ridge.
    """
    targets = (functional.one_hot(labels, classes) if task == "classification" else labels).double()
    middle = 0.5 if task == "multilabel" else 0.0  # where an indicator's logit is 0; classes are only told apart
    candidates = (
        (float(mean_loss(scale * (fit.left_out - middle), labels, task, 0.0, None)), scale, fit)
        for fit in ridge_path(_centred(features), targets, PENALTIES)
        for scale in (SCALES if task != "regression" else (1.0,))
    )
    _, scale, best = min(candidates, key=lambda candidate: candidate[0])
    return LinearHead(scale * best.weight, scale * (best.bias - middle), best.strength)


def ridge_path(given: Centred, targets: Tensor, strengths: Sequence[float]) -> Iterator[Ridge]:
    """Ridge regressions of (N, C) targets on (N, D) inputs, one per penalty (given in mean eigenvalues of the scatter),
    from one eigendecomposition of the smaller Gram matrix; float64 in and out. Several at a time, which reads the inputs once."""
    inputs, share = given.rows, targets.mean(dim=0)
    rest = targets - share
    if len(inputs) >= inputs.shape[1]:
        eigenvalues, basis = torch.linalg.eigh(given.scatter)
        scores = dual = inputs @ basis
    else:
        eigenvalues, dual = torch.linalg.eigh(inputs @ inputs.T)
        basis = inputs.T @ dual
        scores = dual * eigenvalues
    projected, overlap = dual.T @ rest, scores * dual
    unit = float(eigenvalues.mean().clamp(min=1e-30))
    together = max(1, COLUMNS // targets.shape[1])
    for some in (strengths[start : start + together] for start in range(0, len(strengths), together)):
        penalties = unit * torch.tensor(some, dtype=torch.float64)
        gains = 1 / (eigenvalues.clamp(min=0)[:, None] + penalties)  # (K, S)
        solutions = (gains[:, :, None] * projected[:, None]).flatten(1)  # (K, S C)
        weights = (basis @ solutions).T.unflatten(0, (len(some), -1))  # (S, C, D)
        residuals = rest[:, None] - (scores @ solutions).unflatten(1, (len(some), -1))  # (N, S, C)
        leverages = overlap @ gains + 1 / len(inputs)  # (N, S)
        left_out = targets[:, None] - residuals / (1 - leverages).clamp(min=1e-9)[..., None]
        for number, strength in enumerate(some):
            weight = weights[number]
            yield Ridge(strength, weight, share - weight @ given.centre, left_out[:, number])


def lda(features: Tensor | Centred, labels: Tensor, classes: int) -> LinearHead:
    """Linear discriminant analysis on (N, D) features, for (N,) labels below `classes`, each of which occurs.

    The covariance within classes is shrunk towards a multiple of the identity as far as Ledoit and Wolf (2004) have it,
    so that it has an inverse whatever N and D.
    """
    given = _centred(features)
    rows, counts = given.rows, torch.bincount(labels, minlength=classes)
    means = rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows) / counts[:, None]
    covariance = (given.scatter - means.T @ (counts[:, None] * means)) / len(rows)  # within classes
    strength = shrinkage(rows - means[labels], covariance)
    unit = covariance.diagonal().mean().clamp(min=1e-30)
    shrunk = (1 - strength) * covariance
    shrunk.diagonal().add_(max(strength, 1e-9) * unit)
    weight = torch.linalg.solve(shrunk, means.T).T
    bias = (counts / len(rows)).log() - (weight * means).sum(dim=1) / 2 - weight @ given.centre
    return LinearHead(weight, bias, strength)


def _centred(features: Tensor | Centred) -> Centred:
    return features if isinstance(features, Centred) else Centred(features)


def shrinkage(inputs: Tensor, covariance: Tensor) -> float:
    """How far, from 0 to 1, to shrink the (D, D) covariance of (N, D) inputs of mean zero towards the identity times its
    mean eigenvalue: Ledoit and Wolf's estimate of what errs least."""
    n, dim = inputs.shape
    size = float(covariance.square().sum())
    spread = size - float(covariance.trace()) ** 2 / dim  # squared distance from the target
    noise = (float(inputs.square().sum(dim=1).square().sum()) / n - size) / n
    return min(max(noise, 0.0) / spread, 1.0) if spread > 0 else 1.0


def pooled(activations: Tensor) -> Tensor:
    """(N, …) activations as (N, D) features: the mean over positions. (N, C, H, W) and (N, H, W, C) are told apart by the
    two equal sides of a square; (N, T, D) are T tokens."""
    shape = activations.shape[1:]
    if len(shape) == 1:
        return activations
    return activations.mean(dim=positions(shape))


def positions(shape: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of a batch of activations, each of this shape, that are positions and not channels."""
    rank = len(shape)
    channels_last = rank == 2 or (rank == 3 and shape[0] == shape[1] != shape[2])
    return tuple(range(1, rank)) if channels_last else tuple(range(2, rank + 1))


def pooled_width(shape: Sequence[int]) -> int:
    """Features that `pooled` gives of an activation of this shape."""
    return math.prod(size for dim, size in enumerate(shape, 1) if len(shape) == 1 or dim not in positions(shape))
