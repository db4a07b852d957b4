"""Classifiers by distance between features: k nearest neighbours, and the nearest class mean. Nothing is fitted but k.

Features are compared by their cosine, as is usual for those of a pretrained network (Wu et al. 2018): how strong they are
says more of an image's contrast than of its class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

NEIGHBOURS = (1, 3, 5, 9, 15, 25)


@dataclass(frozen=True)
class Nearest:
    """(N, D) features to (N, C) shares of each class among the nearest: no probabilities, as most are 0."""

    model: NearestNeighbors
    labels: np.ndarray  # of what it knows
    classes: int
    strength: int
    """How many neighbours."""

    def __call__(self, features: Tensor) -> Tensor:
        nearest = self.model.kneighbors(directions(features), self.strength, return_distance=False)  # (N, k)
        return torch.from_numpy(votes(self.labels[nearest], self.classes) / self.strength)


def nearest_neighbours(features: Tensor, labels: Tensor, classes: int) -> Nearest:
    """The k nearest of (N, D) features, N at least 2, for (N,) labels below `classes`. k is that of `NEIGHBOURS` which is right
    most often when each sample is left out in turn; of equal ones the least."""
    model, truth = NearestNeighbors(algorithm="brute").fit(directions(features)), labels.numpy()
    most = min(max(NEIGHBOURS), len(truth) - 1)
    others = truth[
        model.kneighbors(n_neighbors=most, return_distance=False)
    ]  # (N, most): labels, its own not among them
    choices = [k for k in NEIGHBOURS if k <= most]
    right = {k: np.mean(votes(others[:, :k], classes).argmax(axis=1) == truth) for k in choices}
    return Nearest(model, truth, classes, max(choices, key=lambda k: (right[k], -k)))


def nearest_mean(features: Tensor, labels: Tensor, classes: int) -> Nearest:
    """The nearest class mean (Mensink et al. 2013) of (N, D) features, for (N,) labels below `classes`, each of which occurs."""
    known, truth = directions(features), labels.numpy()
    means = np.stack([known[truth == label].mean(axis=0) for label in range(classes)])
    return Nearest(NearestNeighbors(algorithm="brute").fit(means), np.arange(classes), classes, 1)


def votes(labels: np.ndarray, classes: int) -> np.ndarray:
    """(N, C) how often each class is among (N, k) labels; float64."""
    found = np.zeros((len(labels), classes))
    for place in range(labels.shape[1]):
        found[np.arange(len(labels)), labels[:, place]] += 1
    return found


def directions(features: Tensor) -> np.ndarray:
    """(N, D) features as unit vectors in float64, whose distances order as cosines do; zeros stay zeros."""
    features = features.double()
    return (features / features.norm(dim=1, keepdim=True).clamp(min=1e-30)).numpy()
