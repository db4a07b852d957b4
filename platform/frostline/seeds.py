"""One seed per use of randomness, all of them derived from the job's."""

from __future__ import annotations

import hashlib
import json

from frostline.models import Frozen


class Seeds(Frozen):
    """One seed per use of randomness (P13): changing the strategy changes none of the others."""

    split: int
    subset: int
    augment: int
    order: int
    head: int
    dropout: int
    init: int = 0
    """Of the backbone, where it starts from random weights."""


def derive_seed(root: int, *names: str | int) -> int:
    """A seed below 2^30 for one named use of randomness under `root`; different names give independent seeds."""
    text = json.dumps([root, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 2
