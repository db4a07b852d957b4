"""What a search cost, and what stored activations, packs and early stops spared it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Account:
    """Device seconds of a study, both rounds, and how much there was of what they bought."""

    trials_s: float
    """What the trials took."""
    extractions_s: float
    """What activations for all of them took."""
    alone_s: float
    """What the trials would have taken one by one, with nothing stored and nothing shared."""
    unknown: int
    """Trials of which that is not known; they count in `trials_s` only."""
    stopped_s: float
    """An estimate: what the epochs that early stops left out would have taken alone, at each trial's own pace."""
    epochs: int
    epochs_left_out: int
    """By early stops."""
    images: int
    """That passed frozen stages for the feature store."""
    stored_bytes: int
    packed: int
    """Trials that trained beside others."""
    trials: int

    @property
    def shared_s(self) -> float:
        """What stored activations and packs spared; less than 0 where they cost more than they gave."""
        return self.alone_s - self.trials_s - self.extractions_s


def account(trials: Sequence[Mapping[str, Any]], extractions: Sequence[Mapping[str, Any]]) -> Account:
    """The account of these rows of the tables `trials` and `extractions`."""
    pruned = [row for row in trials if row["status"] == "pruned" and row["epochs"] and row["epochs_asked"]]
    return Account(
        trials_s=_sum(trials, "spent_s"),
        extractions_s=_sum(extractions, "seconds"),
        alone_s=_sum(trials, "alone_s"),
        unknown=sum(row["alone_s"] is None for row in trials),
        stopped_s=sum((row["alone_s"] or 0.0) * (row["epochs_asked"] / row["epochs"] - 1) for row in pruned),
        epochs=int(_sum(trials, "epochs")),
        epochs_left_out=sum(row["epochs_asked"] - row["epochs"] for row in pruned),
        images=int(_sum(extractions, "images")),
        stored_bytes=int(_sum(extractions, "bytes")),
        packed=sum((row["lanes"] or 1) > 1 for row in trials),
        trials=len(trials),
    )


def _sum(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(row[key] or 0 for row in rows)
