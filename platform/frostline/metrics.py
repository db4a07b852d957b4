"""Scores of a network's outputs, in NumPy: of logits of classes or of labels, and of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, log_softmax

from frostline.spec import Metric, Task
from frostline.targets import CLASSES, Target

OF_PROBABILITIES: tuple[Metric, ...] = ("nll", "ece", "brier")
"""Those that mean nothing where outputs order classes and are no logits of probabilities."""
TOP = 5


def scores(logits: np.ndarray, labels: np.ndarray, *also: Metric, target: Target = CLASSES) -> dict[Metric, float]:
    """The metrics that `targets` has for every epoch, and those of its further ones that are asked for; N at least 1.

    Of a classification (N, C) logits against (N,) labels in 0..C-1; of several labels (N, C) logits against (N, C) of 0 and 1; of a
    regression (N, 1) outputs against (N, 1) labels, both as `target` counts them, and scored in the unit of the data.
    """
    if target.task == "classification":
        by_class = np.ascontiguousarray(logits.T, np.float64)  # NumPy reduces a short last axis four times slower
        predicted, top = by_class.argmax(axis=0), by_class.max(axis=0)
        losses = np.log(np.exp(by_class - top).sum(axis=0)) + (top - by_class[labels, np.arange(len(logits))])
        found = scores_of(labels, predicted, losses, len(by_class))
    elif target.task == "multilabel":
        found = scores_of_sets(labels > 0.5, logits > 0, losses_of_sets(logits, labels))
    else:
        logits, labels = target.in_units(logits), target.in_units(labels)
        found = scores_of_numbers(labels[:, 0], logits[:, 0])
    further = _FURTHER[target.task]
    for name in also:
        if name in further:
            found[name] = further[name](logits, labels)
    return found


def scores_of(labels: np.ndarray, predicted: np.ndarray, losses: np.ndarray, classes: int) -> dict[Metric, float]:
    """Of (N,) labels and predictions, in 0..classes-1, and negative log-likelihoods in nats.

    Balanced accuracy is the mean recall over the classes that occur in `labels`; macro F1 averages over the classes that
    occur in labels or predictions, as scikit-learn does; nll is the mean negative log-likelihood in nats.
    """
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    actual, called = np.bincount(labels, minlength=classes), np.bincount(predicted, minlength=classes)
    seen, either = actual > 0, actual + called > 0
    return {
        "accuracy": float(hits.sum() / len(labels)),
        "balanced_accuracy": float((hits[seen] / actual[seen]).mean()),
        "macro_f1": float((2 * hits[either] / (actual + called)[either]).mean()),
        "nll": float(losses.mean()),
    }


def scores_of_sets(labels: np.ndarray, predicted: np.ndarray, losses: np.ndarray) -> dict[Metric, float]:
    """Of (N, C) bool, whether a sample has each label and whether it is said to, and (N,) `losses_of_sets`.

    Micro F1 counts all labels together; macro F1 averages over the labels that occur or are predicted; where none does both are 1.
    """
    hits, both = (labels & predicted).sum(axis=0), labels.sum(axis=0) + predicted.sum(axis=0)
    either = both > 0
    return {
        "micro_f1": float(2 * hits.sum() / both.sum()) if either.any() else 1.0,
        "macro_f1": float((2 * hits[either] / both[either]).mean()) if either.any() else 1.0,
        "exact_match": float((labels == predicted).all(axis=1).mean()),
        "nll": float(losses.mean()),
    }


def scores_of_numbers(labels: np.ndarray, predicted: np.ndarray) -> dict[Metric, float]:
    """Of (N,) numbers. r2 is the share of the labels' variance that is explained: 0 for whoever says their mean, NaN where all are
    equal."""
    errors, spread = np.square(predicted - labels).mean(), labels.var()
    return {
        "rmse": float(np.sqrt(errors)),
        "mae": float(np.abs(predicted - labels).mean()),
        "r2": float(1 - errors / spread) if spread > 0 else float("nan"),
    }


def losses_of_sets(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) negative log-likelihoods in nats, each the mean over labels, of (N, C) logits against (N, C) of 0 and 1."""
    logits = logits.astype(np.float64)
    return (np.logaddexp(0, logits) - logits * labels).mean(axis=1)


def auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """The area under the receiver operating characteristic of each class against the others, by its probability, averaged over
    the classes that occur in `labels` (Hand and Till 2001 discuss the kinds); of two classes it is that of either. NaN where only
    one occurs."""
    likely, present = _likely(logits), np.unique(labels)
    return _mean([_area(likely[:, label], labels == label) for label in present] if len(present) > 1 else [])


def auroc_of_sets(logits: np.ndarray, labels: np.ndarray) -> float:
    """The same of labels of which a sample may have any number: averaged over those that some have and some lack; NaN without any."""
    told = [label for label, share in enumerate(labels.mean(axis=0)) if 0 < share < 1]
    return _mean([_area(logits[:, label], labels[:, label] > 0.5) for label in told])


def _area(order: np.ndarray, positive: np.ndarray) -> float:
    """The probability that one of (N,) positives stands above one of the others in this order."""
    from scipy.stats import rankdata  # it takes half a second to import, which every process of a search would pay

    ones = int(positive.sum())
    return (rankdata(order)[positive].sum() - ones * (ones + 1) / 2) / (ones * (len(positive) - ones))


def average_precision(logits: np.ndarray, labels: np.ndarray) -> float:
    """Of each label that occurs, the mean of the precisions at its samples when all are ordered by its logit (equal ones are one step,
    as scikit-learn has it); their mean, which detection and tagging call mAP. NaN where no label occurs."""
    found = []
    for order, positive in zip(logits.T, labels.T > 0.5, strict=True):
        if positive.any():
            falling = np.argsort(-order, kind="stable")
            last = np.append(np.diff(order[falling]) != 0, True)
            hits = np.cumsum(positive[falling])[last]
            found.append(np.diff(hits, prepend=0) @ (hits / (np.flatnonzero(last) + 1)) / positive.sum())
    return _mean(found)


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


def brier_of_sets(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean squared distance of each label's probability from the truth: from 0 to 1."""
    return float(np.square(expit(logits.astype(np.float64)) - labels).mean())


def spearman(values: np.ndarray, labels: np.ndarray) -> float:
    """The rank correlation of (N, 1) predicted numbers and labels; NaN where all of either are equal."""
    from scipy.stats import rankdata

    ranks = [rankdata(each[:, 0]) for each in (values, labels)]
    if min(rank.std() for rank in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


_FURTHER: dict[Task, dict[Metric, Callable[[np.ndarray, np.ndarray], float]]] = {
    "classification": {"auroc": auroc, "top5_accuracy": top5_accuracy, "ece": ece, "brier": brier},
    "multilabel": {"average_precision": average_precision, "auroc": auroc_of_sets, "brier": brier_of_sets},
    "regression": {"spearman": spearman},
}


def probabilities(logits: np.ndarray, task: Task = "classification") -> np.ndarray:
    """(N, C) probabilities in float32, of classes that exclude each other or of labels that do not."""
    likely = expit(logits.astype(np.float64)) if task == "multilabel" else _likely(logits)
    return likely.astype(np.float32)


def said_of(logits: np.ndarray, classes: Sequence[str], task: Task) -> list[Any]:
    """What (N, C) logits, or (N, 1) numbers, say of each sample: its likeliest class, its labels (those of a probability above one half),
    or the number."""
    if task == "regression":
        return logits[:, 0].tolist()
    if task == "multilabel":
        return [tuple(classes[label] for label in np.flatnonzero(row).tolist()) for row in logits > 0]
    return [classes[label] for label in logits.argmax(axis=1).tolist()]


def _likely(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits.astype(np.float64), axis=1))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
