"""Studies that earlier versions wrote (tests/data) are read as they were then, or refused with both versions named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import frostline
from _schemas import DATA, PRESENT, job_of, said_of
from frostline import results
from frostline.cli import main
from frostline.fsck import examine, repair

STUDIES = sorted(DATA.glob("schema-*"))


def lost(then: Any, now: Any, at: str = "") -> list[str]:
    """Where something that was said then is said otherwise now, or no more; what is said besides is not looked at."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [line for key in then for line in lost(then[key], now.get(key, "no such key"), f"{at}.{key}")]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = enumerate(zip(then, now, strict=True))
        return [line for number, (a, b) in pairs for line in lost(a, b, f"{at}.{number}")]
    return [] if then == now else [f"{at}: was {then!r}, now {now!r}"]


def test_the_present_schema_has_a_study() -> None:
    assert DATA / f"schema-{PRESENT}" in STUDIES, "python tests/_schemas.py writes it"
    sizes = [path.stat().st_size for folder in STUDIES for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) < len(STUDIES) * 128 << 10


@pytest.mark.fault(48)
@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_a_study_of_each_schema_says_what_it_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = shutil.copytree(folder / "study", tmp_path / "study")
    if folder.name != f"schema-{PRESENT}":
        assert main(["results", str(study)]) == 2
        assert (
            f"written with schema {folder.name[7:]}, and this Frostline reads schema {PRESENT}"
            in capsys.readouterr().err
        )
        return
    assert lost(json.loads((folder / "expected.json").read_text()), said_of(study)) == []
    assert [(each.file, each.repair) for each in examine(study).problems] == [("report.html", "report")]
    done, found = repair(study)
    assert done == ["report.html: written"]
    assert found.problems == []


@pytest.mark.fault(48)
def test_a_study_of_the_present_schema_goes_on(tmp_path: Path) -> None:
    study = shutil.copytree(DATA / f"schema-{PRESENT}" / "study", tmp_path / "study")
    before = {row["trial_id"]: row for row in results.read_trials(study).to_pylist()}
    frostline.search(job_of(study, "search.trials=4"), inline=True)
    after = {row["trial_id"]: row for row in results.read_trials(study).to_pylist()}
    assert before.items() <= after.items()
    assert sum(row["round"] == "search" for row in after.values()) == 4
