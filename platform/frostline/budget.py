"""What each arm may spend: an equal share of the trials, and of steps or device seconds where the job limits these."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from frostline.spec import Search


class Budget:
    """The arms' accounts. A trial is charged what it would have taken by itself, stopped and failed ones included, so that no
    arm is cheap because another paid."""

    def __init__(self, search: Search, shares: Mapping[str, int]) -> None:
        self.shares = shares
        limits = {"steps": search.steps, "device_s": search.device_s}
        self.limits = {unit: limit / len(shares) for unit, limit in limits.items() if limit is not None}
        self.spent = {unit: Counter[str]() for unit in self.limits}
        self.ended = Counter[str]()

    def charge(self, row: Mapping[str, Any]) -> None:
        """Take in the row of a search trial that has ended."""
        arm, alone_s = row["arm"], row["alone_s"]
        steps = row["epochs"] * math.ceil((row.get("n_train") or 0) / row["batch_size"])
        costs = {"steps": steps, "device_s": row["seconds"] if alone_s is None else alone_s}
        self.ended[arm] += 1
        for unit, spent in self.spent.items():
            spent[arm] += costs[unit]

    def left(self, arm: str, asked: int) -> int:
        """How many trials an arm that has asked for so many may still ask for now: its share of the trials, and what a limit
        leaves it at the mean cost of its trials so far, those that run being charged that too; one, until one has ended. One
        at least while none of its runs and the limit is not reached."""
        left, running = self.shares[arm] - asked, asked - self.ended[arm]
        for unit, limit in self.limits.items():
            if not self.ended[arm]:
                left = min(left, 1 - running)
            elif self.spent[unit][arm] >= limit:
                left = 0
            elif mean := self.spent[unit][arm] / self.ended[arm]:
                left = min(left, math.ceil((limit - self.spent[unit][arm]) / mean) - running)
        return max(0, left)
