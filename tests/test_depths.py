"""Depths: whole numbers count stages, shares are of all of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.depths import cut_of, depth_of, end_of
from frostline.spec import Freeze, Head, Train
from frostline.trialspec import Config


@pytest.mark.parametrize(
    ("strategy", "depth", "frozen"),
    [
        ("full", None, 0),
        ("linear_probe", None, 7),
        ("freeze_depth", 0, 0),
        ("freeze_depth", 0.0, 0),
        ("freeze_depth", 1, 1),
        ("freeze_depth", 1.0, 7),
        ("freeze_depth", 0.5, 4),
        ("freeze_depth", 0.4, 3),
        ("freeze_depth", 7, 7),
        ("freeze_depth", "all", 7),
    ],
)
def test_how_many_of_seven_stages_are_frozen(strategy: Any, depth: Any, frozen: int) -> None:
    assert depth_of(Freeze(strategy=strategy, depth=depth), 7) == frozen


def test_more_stages_than_there_are_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match=r"freeze\.depth = 8: this backbone has 7 stages"):
        depth_of(Freeze(strategy="freeze_depth", depth=8), 7)


@pytest.mark.parametrize(
    ("freeze", "head", "cut", "end"), [(0, 3, 0, 3), (2, 3, 2, 3), (5, 3, 3, 3), ("all", "all", 7, 7), (7, 0.5, 4, 4)]
)
def test_a_head_on_fewer_stages_leaves_fewer_to_train(freeze: Any, head: Any, cut: int, end: int) -> None:
    config = Config(freeze=Freeze(strategy="freeze_depth", depth=freeze), head=Head(depth=head), train=Train())
    assert (cut_of(config, 7), end_of(config.head, 7)) == (cut, end)


def test_a_head_needs_a_stage_that_is_there() -> None:
    with pytest.raises(ValueError, match=r"head\.depth = 8: this backbone has 7 stages"):
        end_of(Head(depth=8), 7)
    for none in (0, 0.0, 0.05):
        with pytest.raises(ValueError, match="a head stands after at least one stage"):
            end_of(Head(depth=none), 7)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 60))
def test_a_larger_share_never_freezes_fewer_stages(one: float, two: float, stages: int) -> None:
    shallow, deep = (depth_of(Freeze(strategy="freeze_depth", depth=share), stages) for share in sorted((one, two)))
    assert 0 <= shallow <= deep <= stages
