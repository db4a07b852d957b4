"""Bundles of toy studies on texts, and on pairs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import frostline
from frostline.spec import Job
from frostline.testing import text_job, text_rows


def pair_job(results: Path, overrides: list[str], **sections: Any) -> Job:
    """`text_job` on pairs: a text, and the same backwards."""
    table = results.parent / "pairs.csv"
    rows = (f"{row['text']},{row['text'][::-1]},{row['label']}\n" for row in text_rows())
    table.write_text("first,second,label\n" + "".join(rows))
    data = {"path": str(table), "text_column": "first", "pair_column": "second", "max_tokens": 24}
    return text_job(results, overrides, data=data, **sections)


def text_bundle(study: Path, arm: dict[str, Any], *overrides: str, pair: bool = False) -> Path:
    """The bundle of a study of one trial of this arm. Studies in one folder have one encoder."""
    make = pair_job if pair else text_job
    job = make(study, ["search.trials=1", "confirm.seeds=1", *overrides], arms={"only": arm})
    return frostline.search(job, inline=True) / "bundle"
