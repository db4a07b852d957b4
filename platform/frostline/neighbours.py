"""Classifiers by distance between features: k nearest neighbours, and the nearest class mean. Nothing is fitted but k.

Features are compared by their cosine, as is usual for those of a pretrained network (Wu et al. 2018): how strong they are
says more of an image's contrast than of its class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

NEIGHBOURS = (1, 3, 5, 9, 15, 25)


@dataclass(frozen=True)
class Nearest:
    """(N, D) features to (N, C) shares of each class among the nearest: no probabilities, as most are 0."""

    model: KNeighborsClassifier
    strength: float
    """How many neighbours."""

    def __call__(self, features: Tensor) -> Tensor:
        return torch.from_numpy(self.model.predict_proba(directions(features)))


def nearest_neighbours(features: Tensor, labels: Tensor, classes: int) -> Nearest:
    """The k nearest of (N, D) features, N at least 2, for (N,) labels below `classes`, each of which occurs. k is that of
    `NEIGHBOURS` which is right most often when each sample is left out in turn; of equal ones the least."""
    known, truth = directions(features), labels.numpy()
    most = min(max(NEIGHBOURS), len(known) - 1)
    others = (
        NearestNeighbors(n_neighbors=most, algorithm="brute").fit(known).kneighbors(return_distance=False)
    )  # (N, K)
    votes, right = np.zeros((len(known), classes), np.int32), {}
    for place in range(most):
        votes[np.arange(len(known)), truth[others[:, place]]] += 1
        right[place + 1] = np.mean(votes.argmax(axis=1) == truth)
    k = max((k for k in NEIGHBOURS if k <= most), key=lambda k: (right[k], -k))
    return Nearest(KNeighborsClassifier(k, algorithm="brute").fit(known, truth), k)


def nearest_mean(features: Tensor, labels: Tensor, classes: int) -> Nearest:
    """The nearest class mean (Mensink et al. 2013) of (N, D) features, for (N,) labels below `classes`, each of which occurs."""
    known, truth = directions(features), labels.numpy()
    means = np.stack([known[truth == label].mean(axis=0) for label in range(classes)])
    return Nearest(KNeighborsClassifier(1, algorithm="brute").fit(means, np.arange(classes)), 1)


def directions(features: Tensor) -> np.ndarray:
    """(N, D) features as unit vectors in float64, whose distances order as cosines do; zeros stay zeros."""
    features = features.double()
    return (features / features.norm(dim=1, keepdim=True).clamp(min=1e-30)).numpy()
