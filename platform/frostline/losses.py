"""What training makes small, by task, for one network; `lanes` has the same with its gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from frostline.spec import Task


def mean_loss(outputs: Tensor, labels: Tensor, task: Task, smoothing: float, weights: Tensor | None) -> Tensor:
    """The mean loss of (N, C) outputs: the cross-entropy with (N,) classes, each sample's weighed by its class; the binary one with
    (N, C) of 0 and 1, the mean over labels, weighed where a sample has the label; the squared error of (N, C) numbers.

    `weights` is (C,), as `balance` gives it.
    """
    if task == "regression":
        return functional.mse_loss(outputs, labels.to(outputs.dtype))
    if task == "multilabel":
        labels = labels.to(outputs.dtype)
        return functional.binary_cross_entropy_with_logits(
            outputs, softened(labels, smoothing), None if weights is None else label_weights(labels, weights)
        )
    if weights is None:
        return functional.cross_entropy(outputs, labels, label_smoothing=smoothing)
    losses = functional.cross_entropy(outputs, labels, label_smoothing=smoothing, reduction="none")
    return (losses * weights[labels].to(losses.dtype)).mean()


def balance(labels: Tensor, classes: int, task: Task) -> Tensor:
    """(C,) weights for skewed data. Of (N,) classes samples / (classes x samples of the class), so that all samples together weigh 1
    on average, if every class occurs; of (N, C) labels those that lack each over those that have it."""
    if task == "multilabel":
        have = labels.sum(dim=0).clamp(min=1)
        return ((len(labels) - have) / have).to(torch.get_default_dtype())
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return (len(labels) / (classes * counts)).to(torch.get_default_dtype())


def softened(labels: Tensor, smoothing: float | Tensor) -> Tensor:
    """0 and 1 drawn towards one half, by a share."""
    return labels * (1 - smoothing) + smoothing / 2


def label_weights(labels: Tensor, weights: Tensor) -> Tensor:
    """How much each of (…, C) labels of 0 and 1 weighs: its weight where a sample has it, else 1."""
    return 1 + labels * (weights.to(labels.dtype) - 1)
