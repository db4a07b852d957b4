"""Where a study stands, for people who wait for it: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frostline.finalists import Finished
from frostline.outcome import EpochRecord


@dataclass(frozen=True)
class Training:
    """A trial that runs."""

    trial_id: str
    epochs: int
    """That it is to train."""
    latest: Sequence[EpochRecord]
    """The record of its last epoch, once there is one."""

    @property
    def left_s(self) -> float | None:
        """As far as the last epoch tells."""
        return next(((self.epochs - record.epoch) * record.seconds for record in self.latest), None)


@dataclass(frozen=True)
class Snapshot:
    """A study as of one moment."""

    done: int
    running: int
    total: int
    pruned: int
    failed: int
    confirmed: int
    confirmed_complete: int
    to_confirm: int
    best: Finished | None
    extracted: int
    """Images, of `to_extract` whose activations were not stored yet."""
    to_extract: int
    elapsed_s: float
    left_s: float | None
    latest: Finished | None
    training: tuple[Training, ...] = ()
    """What runs, where nothing is searched."""
    trouble: str | None = None
    """What went wrong last that is no trial's fault, and ended nothing."""
    stopped: str | None = None
    """Why the search ends before its end, and what to do."""
