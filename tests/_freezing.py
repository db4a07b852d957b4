"""Every strategy with the keys that it needs."""

from __future__ import annotations

from typing import Any, get_args

from frostline.spec import Freeze, Strategy

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
NEEDED: dict[str, dict[str, Any]] = {
    "freeze_depth": {"depth": 2},
    "surgical": {"depth": 1},
    "layer_decay": {"layer_decay": 0.5},
    "discriminative": {"lr_ratio": 0.1},
}


def freezing(strategy: str, **keys: Any) -> Freeze:
    """This strategy, with these keys and those that it cannot be without."""
    return Freeze.model_validate({"strategy": strategy, **NEEDED.get(strategy, {}), **keys})
