"""Scores of a classifier from its logits, in NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax

from frostline.spec import Metric

METRICS: tuple[Metric, ...] = ("accuracy", "balanced_accuracy", "macro_f1", "nll")
"""Those that every epoch is scored by."""
FURTHER: tuple[Metric, ...] = ("auroc", "top5_accuracy", "ece", "brier")
"""Those that only test is scored by, and what has one of them as its objective."""
OF_PROBABILITIES: tuple[Metric, ...] = ("nll", "ece", "brier")
"""Those that mean nothing where outputs order classes and are no logits of probabilities."""
TOP = 5


def scores(logits: np.ndarray, labels: np.ndarray, *also: Metric) -> dict[Metric, float]:
    """The METRICS, and those of FURTHER that are asked for, of (N, C) logits against (N,) labels in 0..C-1, N at least 1.

    Balanced accuracy is the mean recall over the classes that occur in `labels`; macro F1 averages over the classes that
    occur in labels or predictions, as scikit-learn does; nll is the mean negative log-likelihood in nats. For the others see
    `auroc`, `top5_accuracy`, `ece` and `brier`.
    """
    by_class = np.ascontiguousarray(logits.T, np.float64)  # NumPy reduces a short last axis four times slower
    predicted, top = by_class.argmax(axis=0), by_class.max(axis=0)
    losses = np.log(np.exp(by_class - top).sum(axis=0)) + (top - by_class[labels, np.arange(len(logits))])
    found = scores_of(labels, predicted, losses, len(by_class))
    for name in also:
        if name in _FURTHER:
            found[name] = _FURTHER[name](logits, labels)
    return found


def scores_of(labels: np.ndarray, predicted: np.ndarray, losses: np.ndarray, classes: int) -> dict[Metric, float]:
    """`scores` of (N,) labels and predictions, in 0..classes-1, and negative log-likelihoods in nats."""
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    actual, called = np.bincount(labels, minlength=classes), np.bincount(predicted, minlength=classes)
    seen, either = actual > 0, actual + called > 0
    return {
        "accuracy": float(hits.sum() / len(labels)),
        "balanced_accuracy": float((hits[seen] / actual[seen]).mean()),
        "macro_f1": float((2 * hits[either] / (actual + called)[either]).mean()),
        "nll": float(losses.mean()),
    }


def auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """The area under the receiver operating characteristic of each class against the others, by its probability, averaged over
    the classes that occur in `labels` (Hand and Till 2001 discuss the kinds); of two classes it is that of either. NaN where only
    one occurs."""
    from scipy.stats import rankdata  # it takes half a second to import, which every process of a search would pay

    likely = _likely(logits)
    areas = []
    for label in np.unique(labels):
        positive = labels == label
        ones = int(positive.sum())
        if (zeros := len(labels) - ones) == 0:
            return float("nan")
        ranks = rankdata(likely[:, label])
        areas.append((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))
    return float(np.mean(areas))


def top5_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of samples of which fewer than five classes have a higher logit than the true one."""
    own = logits[np.arange(len(labels)), labels][:, None]
    return float(((logits > own).sum(axis=1) < TOP).mean())


def ece(logits: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error, as comparisons give it: see `stats.calibration_error`."""
    from frostline.stats import calibration_error  # so does this

    likely = _likely(logits)
    return calibration_error(likely.max(axis=1), likely.argmax(axis=1) == labels)


def brier(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean squared distance of the probabilities from the truth, summed over classes (Brier 1950): from 0 to 2."""
    likely = _likely(logits)
    likely[np.arange(len(labels)), labels] -= 1
    return float(np.square(likely).sum(axis=1).mean())


_FURTHER: dict[Metric, Callable[[np.ndarray, np.ndarray], float]] = {
    "auroc": auroc,
    "top5_accuracy": top5_accuracy,
    "ece": ece,
    "brier": brier,
}


def probabilities(logits: np.ndarray) -> np.ndarray:
    """(N, C) class probabilities in float32."""
    return _likely(logits).astype(np.float32)


def _likely(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits.astype(np.float64), axis=1))
