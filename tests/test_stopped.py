"""Searches that are stopped before their end, for real, and go on with the same command once the cause is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import frostline
import frostline.inline
import frostline.tune
from frostline import results
from frostline.api import SearchFailedError
from frostline.cli import main
from frostline.fsck import examine
from frostline.testing import toy_job

FRAGILE = """
from pathlib import Path
from torch import nn
from frostline.testing import toy_backbone

BROKEN = Path(__file__).with_name("broken")

class Fragile(nn.Sequential):
    def forward(self, images):
        if BROKEN.exists():
            raise KeyError(f"layer {id(images)}")
        return super().forward(images)

def fragile():
    made = toy_backbone()
    made["module"].block2 = Fragile(*made["module"].block2)
    return made
"""


@pytest.mark.parametrize("where", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_search_of_which_all_fails_alike(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backbone breaks after it has been looked at, which is when a search begins; a worker of Ray looks at it again."""
    kind = "internal" if where == "inline" else "user_error"
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    options = [
        "search.trials=24",
        "search.pruner.kind=none",
        "train.epochs=1",
        "confirm.seeds=1",
        "features.cache=none",
    ]
    job = toy_job(tmp_path / "study", options, backbone={"name": "python:fragile:fragile", "weights": "random"})
    module: Any = frostline.tune if where == "ray" else frostline.inline
    run = module.run_tune if where == "ray" else module.run_inline

    def breaks(*arguments: Any, **more: Any) -> Any:
        (tmp_path / "broken").touch()
        return run(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, run.__name__, breaks)
        with pytest.raises(
            SearchFailedError, match=rf"all \d+ trials failed alike \({kind}\): .*KeyError: 'layer \d+'"
        ):
            frostline.search(job, inline=where == "inline")
    ended = results.read_trials(job.folder).num_rows
    assert 5 <= ended <= 16
    assert main(["results", str(job.folder)]) == 0
    assert f"failed, {kind}: {ended}, for example: " in capsys.readouterr().out
    (tmp_path / "broken").unlink()
    frostline.search(job, inline=where == "inline")
    rows = results.read_trials(job.folder).to_pylist()
    assert len(rows) == len({row["trial_id"] for row in rows}) == 24 + 1
    assert sum(row["status"] == "failed" for row in rows) == ended
    assert examine(job.folder).problems == []
