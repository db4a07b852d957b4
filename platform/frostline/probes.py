"""Heads in closed form on the pretrained features at every cut: before anything trains, a study learns what they are worth.

Each cut's activations, averaged over positions, get a ridge regression and a linear discriminant analysis, fitted to the
train split and scored on val. What does best says up to which stage the source's features serve the target; the search
begins there, beside full fine-tuning and the linear probe.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue] (it is documented)

from frostline.closedform import Centred, LinearHead, lda, ridge
from frostline.data import Dataset, at_most, subset
from frostline.features import Feed
from frostline.metrics import scores
from frostline.spec import Task
from frostline.targets import EVERY
from frostline.trial import origin_of
from frostline.trialspec import TrialSpec
from frostline.work import Probe
from frostline.world import World

IMAGES = 4096
"""Of the train split at most: more change a head in closed form little, and its cost grows with them."""


def methods(task: Task) -> dict[str, Callable[[Tensor | Centred, Tensor, int], LinearHead]]:
    """The heads in closed form that a task has, by name: LDA tells classes apart that exclude each other."""
    own = {"ridge": partial(ridge, task=task)}
    return {**own, "lda": lda} if task == "classification" else own


def probe(question: Probe, feed: Feed, world: World) -> list[dict[str, Any]]:
    """Fit and score every head: rows of the `probes` table. A head that cannot be fitted has a reason and no scores."""
    spec, origin = question.spec, origin_of(question.spec, world)
    dataset, val = origin.dataset, origin.dataset.indices("val")
    train = fitted_to(dataset, spec)
    labels, truth, rows = torch.from_numpy(dataset.targets(train)), dataset.targets(val), []
    task, metric = dataset.target.task, spec.objective.metric
    for cut in question.cuts:
        features = Centred(feed.means(origin, cut, origin.view(1), train, spec.features))
        shown = feed.means(origin, cut, None, val, spec.features)
        for method, fit in methods(task).items():
            started = time.perf_counter()
            row: dict[str, Any] = {"cut": cut, "stages": len(origin.backbone.stages), "method": method}
            row |= {"features": shown.shape[1], "n_train": len(train), "n_val": len(val)}
            try:
                head = fit(features, labels, len(dataset.classes))
                found = scores(head(shown).numpy(), truth, metric, target=dataset.target)
            except LinAlgError as error:
                row["reason"] = str(error)[:500]
            else:
                row |= {f"val_{name}": found[name] for name in EVERY[task]}
                row |= {"strength": head.strength, "val_score": found[metric]}
            rows.append(row | {"seconds": time.perf_counter() - started})
    return rows


def fitted_to(dataset: Dataset, spec: TrialSpec) -> np.ndarray:
    """The train samples of a trial, sorted, int64; of more than `IMAGES` as many of each class as make that, or all that a
    class has."""
    train = subset(dataset, spec.data.per_class, spec.seeds.subset)
    if len(train) <= IMAGES:
        return train
    return at_most(dataset, max(1, IMAGES // len(dataset.classes)), spec.seeds.subset)
