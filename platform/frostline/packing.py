"""Which trials train together: those that read the same images in the same mini-batches and have the same part to share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frostline.depths import cut_of, end_of
from frostline.trialspec import TrialSpec

SUFFIXES = 8
"""Lanes that share a live prefix pass: for a suffix of an eighth of the work, 8 lanes come to 2.5 of the 3.3 times that
any number could gain, and each lane takes the memory of a network."""


def pack_key(spec: TrialSpec, stages: int) -> tuple[Any, ...] | None:
    """What trials must have in common to be lanes of one pack; None for a trial that runs alone.

    The same images in the same mini-batches (data and its views, subset, order, batch size, precision), and either only
    heads to train, after the same stage, or a live prefix pass to share, whatever the cut.
    """
    end = end_of(spec.config.head, stages)
    heads = cut_of(spec.config, stages) == end
    if not spec.cached or spec.config.train.wise is not None or (spec.config.train.compile and not heads):
        return None
    train, seeds, live = spec.config.train, spec.seeds, spec.augment.views == "live"
    same = (seeds.split, seeds.subset, seeds.augment, seeds.order, train.batch_size, train.precision)
    if live:
        return ("live", *same)
    return ("heads", *same, end) if heads else None


def take_pack(waiting: Sequence[TrialSpec], stages: int, lanes: int, share: int) -> list[TrialSpec]:
    """The next pack from trials that wait: the first of them, and in their order those that may train with it, at most
    `lanes`, and of all that could no more than one in `share`, which is how many packs can start now."""
    first = waiting[0]
    key = pack_key(first, stages)
    if key is None:
        return [first]
    fitting = [spec for spec in waiting if pack_key(spec, stages) == key]
    limit = lanes if key[0] == "heads" else min(lanes, SUFFIXES)
    return fitting[: max(1, min(limit, -(-len(fitting) // share)))]
