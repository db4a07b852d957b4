"""Kinds of failure, what is tried again, and when a search is past hope."""

from __future__ import annotations

import errno
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from frostline.backbone import BackboneError
from frostline.data import DataError
from frostline.failures import (
    _CLASSES,
    FEWEST,
    KINDS,
    VALUES,
    again,
    alike,
    kind_of,
    past_hope,
    signature,
    stops,
)
from frostline.freeze import FreezeError
from frostline.shards import FeatureError
from frostline.training import NonFiniteError

HOMES = ("builtins", "torch", "frostline.training", "frostline.freeze", "frostline.files", "ray.exceptions",
         "ray.train.v2.api.exceptions", "ray.train.v2._internal.exceptions")  # fmt: skip


def from_full_disk() -> Exception:
    """As the feature store raises it: without its cause, yet in its context."""
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise FeatureError(f"the feature store cannot be used: {error}") from None
    except FeatureError as error:
        return error


class ElsewhereError(Exception):
    """As Ray puts it around what another process raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("traceback")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "oom"),
        (NonFiniteError("loss is nan"), "non_finite"),
        (FreezeError("moved"), "audit"),
        (DataError("no class"), "data"),
        (BackboneError("no file"), "user_error"),
        (ValueError("no"), "user_error"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk_full"),
        (OSError(errno.EIO, "Input/output error"), "internal"),
        (from_full_disk(), "disk_full"),
        (ElsewhereError(OSError(errno.ENOSPC, "No space left on device")), "disk_full"),
        (ElsewhereError(DataError("no class")), "data"),
        (ZeroDivisionError(), "internal"),
        (KeyError("no"), "internal"),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_an_exception_has_a_kind(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def test_the_classes_that_are_named_are_there() -> None:
    """They are matched by name: one that is renamed must be renamed here."""
    homes = [importlib.import_module(home) for home in HOMES]
    for name, kind in _CLASSES.items():
        found = {getattr(home, name) for home in homes if hasattr(home, name)}
        assert found, name
        assert all(issubclass(each, Exception) for each in found), name
        assert kind in KINDS


def test_every_kind_is_described() -> None:
    page = (Path(__file__).parent.parent / "docs" / "results.md").read_text()
    for name, kind in KINDS.items():
        assert f"| `{name}` | {kind.what} |" in page
        assert f"| {kind.remedy} |" in page


@pytest.mark.parametrize(
    ("losses", "restarts", "kept", "begun", "expected"),
    [
        (1, 3, True, True, True),
        (3, 3, True, True, True),
        (4, 3, True, True, False),
        (1, 0, True, True, False),
        (1, 3, False, False, True),
        (2, 3, False, False, False),
        (1, 3, False, True, False),
    ],
)
def test_what_is_tried_again(losses: int, restarts: int, kept: bool, begun: bool, expected: bool) -> None:
    for name, kind in KINDS.items():
        answer = again(name, losses, restarts=restarts, kept=kept, begun=begun)
        assert answer == (expected and kind.then == "again"), name
    assert [name for name in KINDS if stops(name)] == ["disk_full"]


DATA = ("data", "DataError: /data/3/x.png is gone")


def test_failures_are_alike_but_for_their_numbers() -> None:
    assert signature(DATA) == signature(("data", "DataError: /data/17/x.png is gone"))
    assert signature(("internal", "KeyError: 'a1b2c3d4'")) == signature(("internal", "KeyError: 'ffff0000'"))
    assert signature(DATA) != signature(("internal", DATA[1]))
    assert signature(DATA) != signature(("data", "DataError: /data/3/y.png is gone"))
    assert alike([DATA] * FEWEST)
    assert not alike([DATA] * (FEWEST - 1))
    assert not alike([DATA] * FEWEST + [("internal", DATA[1])])
    assert not alike([])


def tried(count: int, failure: tuple[str, str] = DATA, arm: str = "a", **fixed: Any) -> list[Any]:
    """Trials over two keys, a choice of two and a range."""
    return [
        (arm, {"head.hidden": 16 * (n % 2), "train.lr": n / 1000, **fixed}, (failure[0], failure[1] + str(n)))
        for n in range(count)
    ]


SIZES = {"a": {"head.hidden": 2, "train.lr": None}}


def test_a_search_of_which_all_fails_alike_is_past_hope() -> None:
    assert past_hope(tried(FEWEST), SIZES)
    assert not past_hope(tried(FEWEST - 1), SIZES)
    assert not past_hope([], SIZES)
    assert not past_hope([*tried(FEWEST), ("a", {"head.hidden": 0, "train.lr": 0.5}, ("data", "another"))], SIZES)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.escapes])
def test_what_another_trial_may_escape_ends_no_search(kind: str) -> None:
    assert not past_hope(tried(50, (kind, "the same")), SIZES)


def test_what_one_value_may_cause_ends_no_search() -> None:
    """Each key must have failed at all of its values, or at several; in every arm."""
    assert not past_hope(tried(50, **{"head.hidden": 16}), SIZES)
    assert not past_hope(tried(50, **{"train.lr": 0.1}), SIZES)
    assert past_hope(tried(50, **{"head.hidden": 16}), {"a": {"train.lr": None}})
    three = [("a", {"depth": n % 3}, DATA) for n in range(30)]
    assert not past_hope(three, {"a": {"depth": 4}})
    assert past_hope(three, {"a": {"depth": 3}})
    assert past_hope([("a", {"depth": n % VALUES}, DATA) for n in range(30)], {"a": {"depth": 12}})
    both = {**SIZES, "b": {"train.lr": None}}
    assert not past_hope(tried(50), both)
    assert not past_hope(tried(50) + tried(VALUES - 1, arm="b"), both)
    assert past_hope(tried(50) + tried(VALUES, arm="b"), both)
    assert past_hope([("a", {}, DATA)] * FEWEST, {"a": {}}), "an arm that searches nothing"
