"""How many stages of a backbone a depth stands for: what is frozen, and what the head stands on."""

from __future__ import annotations

from frostline.spec import Freeze, Head, Strategy
from frostline.trialspec import Config


def depth_of(freeze: Freeze, stages: int) -> int:
    """How many of a backbone's `stages`, from the input on, the strategy freezes throughout. Raises ValueError where it asks
    for more than there are."""
    return frozen_stages(freeze.strategy, freeze.depth, stages)


def frozen_stages(strategy: Strategy, depth: int | float | str | None, stages: int) -> int:
    """`depth_of` a strategy with this `freeze.depth`."""
    fixed: dict[Strategy, int | str] = {"linear_probe": "all", "freeze_embed": 1}
    return stages_of("freeze.depth", fixed.get(strategy, depth or 0), stages)


def end_of(head: Head, stages: int) -> int:
    """After how many of a backbone's `stages` the head stands. Raises ValueError where there are not so many, or for none."""
    end = stages_of("head.depth", head.depth, stages)
    if end == 0:
        raise ValueError(f"head.depth = {head.depth}: a head stands after at least one stage")
    return end


def cut_of(config: Config, stages: int) -> int:
    """The first stage that trains, of those that the head stands on; where that is none, the head's own depth."""
    return min(depth_of(config.freeze, stages), end_of(config.head, stages))


def stages_of(path: str, depth: int | float | str, stages: int) -> int:
    """A depth as a number of stages. Raises ValueError where there are not so many."""
    if isinstance(depth, int):
        if depth > stages:
            raise ValueError(f"{path} = {depth}: this backbone has {stages} stages")
        return depth
    return stages if depth == "all" else round(float(depth) * stages)
