"""Rows reach the tables in parts, each once, whatever fails on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frostline import ledger as module
from frostline import results
from frostline.commit import write_file
from frostline.ledger import Ledger


@pytest.fixture
def ledger(study_folder: Path) -> Ledger:
    study_folder.mkdir()
    write_file(study_folder / "job.json", b"{}")
    return Ledger(study_folder)


def trials(*numbers: int) -> list[dict[str, Any]]:
    return [{"trial_id": f"a-{number:05d}", "number": number, "status": "failed"} for number in numbers]


def numbers(ledger: Ledger) -> list[int]:
    return results.read_trials(ledger.folder)["number"].to_pylist()


def test_rows_are_committed_after_two_seconds_or_256_trials(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [ledger.committed]
    monkeypatch.setattr("frostline.ledger.time.monotonic", lambda: now[0])
    for number in range(257):
        ledger.add("trials", trials(number))
        ledger.commit_if_due()
        assert len(numbers(ledger)) == (0 if number < 255 else 256)
    now[0] += 1.9
    ledger.commit_if_due()
    assert len(numbers(ledger)) == 256
    now[0] += 0.2
    ledger.commit_if_due()
    assert numbers(ledger) == list(range(257))
    now[0] += 9
    ledger.commit_if_due()
    assert ledger.part == 2, "nothing waits, nothing is committed"


def test_other_rows_wait_for_a_trial_and_are_there_with_it(ledger: Ledger) -> None:
    ledger.add("asks", [{"seq": 0, "trial_id": "a-00000"}])
    ledger.commit()
    ledger.close()
    assert results.read_asks(ledger.folder).num_rows == 0
    ledger.add("trials", trials(0))
    ledger.close()
    assert results.read_asks(ledger.folder)["trial_id"].to_pylist() == ["a-00000"]
    assert numbers(Ledger(ledger.folder)) == [0]


def test_rows_of_a_commit_that_failed_are_sent_again(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    real, broken = module.commit_part, ["before", "after"]

    def commit_part(*arguments: Any) -> None:
        """Fails once before it writes and once after it has committed."""
        how = broken.pop() if broken else None
        if how == "before":
            raise OSError(28, "No space left on device")
        real(*arguments)
        if how == "after":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "commit_part", commit_part)
    for number in range(2):
        ledger.add("trials", trials(number))
        with pytest.raises(OSError, match="No space|Input/output"):
            ledger.commit()
    ledger.add("trials", trials(2))
    ledger.close()
    assert numbers(ledger) == [0, 1, 2]
