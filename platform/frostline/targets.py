"""What a network is trained to say, by `data.task`: one class of several, any number of labels, or a number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from frostline.spec import Job, Metric, Task

EVERY: dict[Task, tuple[Metric, ...]] = {
    "classification": ("accuracy", "balanced_accuracy", "macro_f1", "nll"),
    "multilabel": ("micro_f1", "macro_f1", "exact_match", "nll"),
    "regression": ("rmse", "mae", "r2"),
}
"""The metrics that every epoch is scored by."""
FURTHER: dict[Task, tuple[Metric, ...]] = {
    "classification": ("auroc", "top5_accuracy", "ece", "brier"),
    "multilabel": ("average_precision", "auroc", "brier"),
    "regression": ("spearman",),
}
"""Those that only test is scored by, and what has one of them as its objective."""


@dataclass(frozen=True)
class Target:
    """The task, and of a regression what its outputs are counted in."""

    task: Task = "classification"
    mean: float = 0.0
    std: float = 1.0
    """Regressions train on standardised labels, so that learning rates mean the same in every unit: an output o stands for mean + std * o,
    by the labels of train. Once training is over the head gives labels as they are (`head.in_units`), and these are 0 and 1."""

    def in_units(self, values: np.ndarray) -> np.ndarray:
        """(N, 1) outputs or standardised labels of a regression as the data has them, in float64."""
        return self.mean + self.std * values.astype(np.float64)

    def standardised(self, values: np.ndarray) -> np.ndarray:
        """(N, 1) labels of a regression as it trains on them, in float32."""
        return ((values - self.mean) / self.std).astype(np.float32)


CLASSES = Target()
"""Of a classification."""


def task_mistakes(job: Job) -> Iterator[str]:
    """What of a job is not for its task."""
    task, metric = job.data.task, job.objective.metric
    if metric not in (metrics := (*EVERY[task], *FURTHER[task])):
        yield f"objective.metric = {metric!r}: data.task = {task!r} is scored by {', '.join(metrics)}"
    if task != "classification" and job.data.per_class is not None:
        yield f"data.per_class = {job.data.per_class}: data.task = {task!r} has no samples of one class; leave it out"
    if task != "regression":
        return
    for key, none in (("label_smoothing", 0.0), ("class_weights", "none")):
        if (value := getattr(job.train, key)) != none:
            yield f"train.{key} = {value!r}: is not for data.task = 'regression', which has no classes; leave it out"
        for name, arm in job.arms.items():
            if (value := arm.space.get(f"train.{key}", none)) != none:
                yield f'arms.{name}.space."train.{key}": is not for data.task = "regression", which has no classes; leave it out'
