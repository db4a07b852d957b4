"""What a study asks of its workers before trials can run: plain data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from frostline.spec import Resources
from frostline.trialspec import TrialSpec


@dataclass(frozen=True)
class Survey:
    """The question what has to be extracted before these trials can run."""

    specs: tuple[TrialSpec, ...]
    cuts: tuple[int, ...] | None
    """Cuts that trials like these may have, where that is not known of each."""
    means: tuple[int, ...]
    """Cuts at which heads in closed form will be tried on the mean over positions."""
    at_once: int
    """Extractions that can run at the same time."""

    @property
    def resources(self) -> Resources:
        return self.specs[0].resources


@dataclass(frozen=True)
class Load:
    """What a worker does that waits while another answers a survey: it loads what the extractions after it will need."""

    survey: Survey

    @property
    def resources(self) -> Resources:
        return self.survey.resources


@dataclass(frozen=True)
class Shard:
    """One extraction: a pass of some samples, under one view, that stores their activations at some cuts, and their means
    over positions at others."""

    spec: TrialSpec
    cuts: tuple[int, ...]
    means: tuple[int, ...]
    view: int | None
    samples: np.ndarray

    @property
    def resources(self) -> Resources:
        return self.spec.resources


@dataclass(frozen=True)
class Supply:
    """The answer: what trials will read, and what of it has to be made."""

    root: str
    """Of the store."""
    keys: tuple[str, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Probe:
    """The question what heads in closed form reach at these cuts; their means are in the store."""

    spec: TrialSpec
    cuts: tuple[int, ...]

    @property
    def resources(self) -> Resources:
        return self.spec.resources
