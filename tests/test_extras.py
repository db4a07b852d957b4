"""Packages that may be missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from frostline.extras import MissingExtraError, extra


def test_a_package_that_is_there_is_imported() -> None:
    assert extra("anything", "json.decoder").JSONDecoder


def test_a_missing_one_names_the_command() -> None:
    with pytest.raises(MissingExtraError, match=r"package nowhere_at_all .*pip install 'frostline\[some\]'"):
        extra("some", "nowhere_at_all.part")


def test_what_such_a_package_lacks_itself_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_here.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        extra("some", "broken_here")
    assert "broken_here" not in sys.modules
