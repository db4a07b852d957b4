"""What features are worth for a task, as one number, without a classifier: LogME and the H-score. Both are better when
higher, and compare features of the same samples with the same labels only."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from frostline.closedform import shrinkage
from frostline.spec import Task

RATIOS = torch.logspace(-8, 8, 81, dtype=torch.float64)
"""Of the weights' precision to the noise's, in mean eigenvalues of the features' Gram matrix; the last is no fit at all."""


def logme(features: Tensor, labels: Tensor, classes: int, task: Task = "classification") -> float:
    """LogME (You et al. 2021): the log evidence per sample of a Bayesian linear regression of class indicators on (N, D)
    features, for (N,) labels below `classes`, each of which occurs; the mean over classes, in nats. Of other tasks, of (N, C) labels.

    For weights of precision a and noise of precision b, both at their best, y ~ N(0, (I + F F' b / a) / b): given a / b the
    best b has a closed form, so that the evidence is maximised over one number, which may have more than one maximum. The
    authors' published code leaves the D - N eigenvalues that are zero out of the determinant, but not out of the weights'
    precision: for N < D it gives random features a large value.
    """
    targets = (functional.one_hot(labels, classes) if task == "classification" else labels).double()
    spectrum, power, rest = spectrum_of(features.double(), targets)
    ratios = RATIOS * float(spectrum.mean().clamp(min=1e-30))
    found = evidence(ratios, spectrum, power, rest, len(targets))  # (R, C)
    total = 0.0
    for label, place in enumerate(found.argmax(dim=0).tolist()):
        low, high = ratios[max(place - 1, 0)].log().item(), ratios[min(place + 1, len(ratios) - 1)].log().item()
        one = power[:, label : label + 1], rest[label : label + 1]

        def loss(ratio: float, one: tuple[Tensor, Tensor] = one) -> float:
            return -evidence(torch.tensor([ratio], dtype=torch.float64).exp(), spectrum, *one, len(targets)).item()

        refined = minimize_scalar(loss, bounds=(low, high), method="bounded")
        total += max(-float(refined.fun), found[place, label].item())  # pyright: ignore[reportAttributeAccessIssue]
    return total / classes


def spectrum_of(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The eigenvalues (K,) of the smaller Gram matrix of (N, D) features, the squared share (K, C) of each of (N, C) targets
    along its eigenvectors in the space of samples, and what of the targets' squares (C,) is in none of them; float64."""
    if len(features) < features.shape[1]:
        spectrum, basis = torch.linalg.eigh(features @ features.T)
        return spectrum.clamp(min=0), (basis.T @ targets).square(), torch.zeros(targets.shape[1], dtype=torch.float64)
    spectrum, basis = torch.linalg.eigh(features.T @ features)
    there = spectrum > 1e-12 * spectrum[-1]
    spectrum, projected = spectrum[there], basis[:, there].T @ (features.T @ targets)
    power = projected.square() / spectrum[:, None]
    return spectrum, power, (targets.square().sum(dim=0) - power.sum(dim=0)).clamp(min=0)


def evidence(ratios: Tensor, spectrum: Tensor, power: Tensor, rest: Tensor, n: int) -> Tensor:
    """(R, C) log evidence per sample at (R,) ratios of precisions, at the best precision of the noise for each; the other
    arguments are of `spectrum_of`."""
    growth = spectrum / ratios[:, None]  # (R, K)
    misfit = ((1 / (1 + growth)) @ power + rest).clamp(min=1e-300)  # (R, C)
    return -((2 * math.pi * math.e * misfit / n).log() + growth.log1p().sum(dim=1)[:, None] / n) / 2


def h_score(features: Tensor, labels: Tensor, classes: int) -> float:
    """The H-score (Bao et al. 2019) of (N, D) features for (N,) labels below `classes`, each of which occurs: how much of
    their variance is between classes, from 0 to classes - 1; regularised as Ibrahim et al. (2022) have it, the covariance
    being shrunk by Ledoit and Wolf's estimate, without which it says nothing where N is not much more than D."""
    features = features.double() - features.double().mean(dim=0)
    counts = torch.bincount(labels, minlength=classes)
    means = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features) / counts[:, None]
    covariance = features.T @ features / len(features)
    strength = shrinkage(features, covariance)
    unit = covariance.diagonal().mean().clamp(min=1e-30)
    shrunk = (1 - strength) * covariance
    shrunk.diagonal().add_(max(strength, 1e-9) * unit)
    apart = (means * torch.linalg.solve(shrunk, means.T).T).sum(dim=1)  # (C,)
    return float((1 - strength) * (counts / len(features) * apart).sum())
