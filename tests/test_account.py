"""What a search cost and was spared."""

from __future__ import annotations

from frostline.account import account


def row(status: str, **more: object) -> dict[str, object]:
    return {"status": status, "spent_s": 1.0, "alone_s": 4.0, "epochs": 10, "epochs_asked": 10, "lanes": 1} | more


def test_what_was_spent_and_spared_adds_up() -> None:
    trials = [
        row("complete"),
        row("pruned", epochs=2, alone_s=1.0, lanes=3),
        row("failed", alone_s=None, epochs=None, lanes=None),
    ]
    extractions = [{"seconds": 0.5, "images": 100, "bytes": 1000}]
    found = account(trials, extractions)
    assert (found.trials_s, found.extractions_s, found.alone_s) == (3.0, 0.5, 5.0)
    assert found.shared_s == 1.5
    assert (found.epochs, found.epochs_left_out) == (12, 8)
    assert found.stopped_s == 4.0  # 8 epochs at half a second
    assert (found.unknown, found.packed, found.trials) == (1, 1, 3)
    assert (found.images, found.stored_bytes) == (100, 1000)


def test_nothing_costs_nothing() -> None:
    assert account([], []).shared_s == 0
