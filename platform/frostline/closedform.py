"""Linear heads in closed form: ridge regression and linear discriminant analysis on pooled features. No learning rate, no
seed, one solution; they say in a second what a backbone's features are worth, and are where LP-FT starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from frostline.losses import mean_loss
from frostline.spec import Task

PENALTIES = tuple(10 ** (k / 2) for k in range(-8, 5))  # in mean eigenvalues of the features' scatter
SCALES = tuple(2.0**k for k in range(8))


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


def ridge(features: Tensor, labels: Tensor, classes: int, task: Task = "classification") -> LinearHead:
    """Ridge regression of class indicators on (N, D) features, for (N,) labels below `classes`; or of (N, C) labels of 0 and 1, or of
    numbers, as `task` says.

    The penalty, and the scale that makes logits of its outputs (none where they are numbers), are those with the lowest leave-one-out
    loss, which is exact for ridge.
    """
    targets = (functional.one_hot(labels, classes) if task == "classification" else labels).double()
    middle = 0.5 if task == "multilabel" else 0.0  # where an indicator's logit is 0; classes are only told apart
    candidates = (
        (float(mean_loss(scale * (fit.left_out - middle), labels, task, 0.0, None)), scale, fit)
        for fit in ridge_path(features.double(), targets, PENALTIES)
        for scale in (SCALES if task != "regression" else (1.0,))
    )
    _, scale, best = min(candidates, key=lambda candidate: candidate[0])
    return LinearHead(scale * best.weight, scale * (best.bias - middle), best.strength)


def ridge_path(inputs: Tensor, targets: Tensor, strengths: Iterable[float]) -> Iterator[Ridge]:
    """Ridge regressions of (N, C) targets on (N, D) inputs, one per penalty (given in mean eigenvalues of the scatter),
    from one eigendecomposition of the smaller Gram matrix; float64 in and out."""
    centre, share = inputs.mean(dim=0), targets.mean(dim=0)
    inputs, rest = inputs - centre, targets - share
    if len(inputs) >= inputs.shape[1]:
        eigenvalues, basis = torch.linalg.eigh(inputs.T @ inputs)
        scores = dual = inputs @ basis
    else:
        eigenvalues, dual = torch.linalg.eigh(inputs @ inputs.T)
        basis = inputs.T @ dual
        scores = dual * eigenvalues
    projected, overlap = dual.T @ rest, scores * dual
    unit = float(eigenvalues.mean().clamp(min=1e-30))
    for strength in strengths:
        gain = 1 / (eigenvalues.clamp(min=0) + unit * strength)  # (K,)
        solution = gain[:, None] * projected  # (K, C)
        weight = (basis @ solution).T
        leverage = overlap @ gain + 1 / len(inputs)
        residual = rest - scores @ solution
        left_out = targets - residual / (1 - leverage).clamp(min=1e-9)[:, None]
        yield Ridge(strength, weight, share - weight @ centre, left_out)


def lda(features: Tensor, labels: Tensor, classes: int) -> LinearHead:
    """Linear discriminant analysis on (N, D) features, for (N,) labels below `classes`, each of which occurs.

    The covariance within classes is shrunk towards a multiple of the identity as far as Ledoit and Wolf (2004) have it,
    so that it has an inverse whatever N and D.
    """
    centre = features.double().mean(dim=0)
    features = features.double() - centre
    counts = torch.bincount(labels, minlength=classes)
    means = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features) / counts[:, None]
    residuals = features - means[labels]
    covariance = residuals.T @ residuals / len(features)
    strength = shrinkage(residuals, covariance)
    unit = covariance.diagonal().mean().clamp(min=1e-30)
    shrunk = (1 - strength) * covariance
    shrunk.diagonal().add_(max(strength, 1e-9) * unit)
    weight = torch.linalg.solve(shrunk, means.T).T
    bias = (counts / len(features)).log() - (weight * means).sum(dim=1) / 2 - weight @ centre
    return LinearHead(weight, bias, strength)


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
