"""The report of a running study."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import frostline
from _studies import write_study
from frostline import refresh
from frostline.refresh import Refresh, after, refreshing
from frostline.testing import toy_job


def test_a_quick_report_is_due_every_minute_and_a_slow_one_takes_a_share() -> None:
    assert after(100.0, 102.0) == 160.0
    assert after(100.0, 110.0) == 300.0


def test_it_is_written_beside_the_search(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "EVERY_S", 0.0)
    write_study(study_folder, {"freeze": []})
    with refreshing(study_folder) as report:
        while not (study_folder / "report.html").exists():
            report.look()
            time.sleep(0.05)
    assert "</html>" in (study_folder / "report.html").read_text()
    assert report.writing is None or report.writing.returncode is not None


def test_before_it_is_due_nothing_is_begun(study_folder: Path) -> None:
    with refreshing(study_folder) as report:
        report.look()
        assert report.writing is None


def test_none_is_left_when_the_search_ends(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "EVERY_S", 0.0)
    with refreshing(study_folder) as report:  # which is no study yet: it fails, and nothing comes of it
        report.look()
    assert report.writing
    assert report.writing.returncode is not None


def test_a_search_looks_at_it_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(Refresh, "look", lambda report: looked.append(report.study))
    job = toy_job(tmp_path / "toy", ["search.trials=2", "train.epochs=1", "confirm.seeds=1"])
    frostline.search(job, inline=True)
    assert set(looked) == {job.folder}
