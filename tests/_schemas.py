"""A small study as the present version writes it, for its later ones to read: `python tests/_schemas.py` after a change of schema.

tests/data/schema-N/study is what a search of digits left, without its report; expected.json is what `frostline results --json` and
`compare --json` said of it then.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import frostline
from frostline import results
from frostline.comparison import compare
from frostline.sealed import VERSION
from frostline.spec import Job
from frostline.testing import toy_job

DATA = Path(__file__).parent / "data"
PRESENT = results.SCHEMAS["trials"].metadata[VERSION].decode()
OPTIONS = ["search.trials=2", "search.startup_trials=2", "confirm.seeds=2", "confirm.finalists=arms", "data.test=0.015"]
ARMS = {
    "freeze": {
        "strategy": "freeze_depth",
        "space": {"freeze.depth": [0, 1, 2], "train.lr": {"low": 1e-4, "high": 1e-2}},
    },
    "probe": {"strategy": "linear_probe", "space": {"train.head_lr": {"low": 1e-3, "high": 1e-1}}},
}


def job_of(folder: Path, *overrides: str) -> Job:
    """The search that wrote it, in another folder."""
    return toy_job(folder, [*OPTIONS, f"features.path={folder.parent / 'features'}", *overrides], arms=ARMS)


def said_of(study: Path) -> dict[str, Any]:
    """What is said of a study to scripts, but for where it lies."""
    compared = asdict(compare([study]))
    return json.loads(json.dumps({"results": results.to_json(study), "compare": compared}).replace(str(study), "STUDY"))


def main() -> None:
    target = DATA / f"schema-{PRESENT}"
    with tempfile.TemporaryDirectory() as root:
        study = Path(root) / "study"
        frostline.search(job_of(study), inline=True)
        for name in ("report.html", "lease.json"):
            (study / name).unlink()
        said = said_of(study)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(study, target / "study")
    (target / "expected.json").write_text(json.dumps(said) + "\n")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1024:.0f} KiB")


if __name__ == "__main__":
    os.environ.setdefault("FROSTLINE_CACHE", tempfile.mkdtemp())
    main()
