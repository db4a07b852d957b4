"""frostline track, whatever the target."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from _tracked import write_tried
from frostline.cli import TRACKERS, main
from frostline.track import TARGETS


def test_the_command_line_knows_every_target() -> None:
    assert tuple(TARGETS) == TRACKERS


def test_an_export_goes_into_the_study_or_where_one_says(
    study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tried(study_folder)
    assert main(["track", str(study_folder), "--to", "optuna"]) == 0
    path = study_folder / "tracked" / "optuna.journal"
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 11 trials in 2 Optuna studies",
        f"open it with: optuna-dashboard {path}",
    ]
    assert main(["track", str(study_folder), "--to", "optuna", "--out", str(tmp_path / "here" / "journal")]) == 0
    assert (tmp_path / "here" / "journal").read_bytes() == path.read_bytes()
    assert main(["results", str(study_folder)]) == 0  # which is none the worse for it


def test_what_is_no_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", str(tmp_path), "--to", "tensorboard"]) == 2
    assert "is not a study" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    target: str, study_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tried(study_folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == target]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, target, None)  # as if it were not installed
    assert main(["track", str(study_folder), "--to", target]) == 2
    assert f"pip install 'frostline[{target}]'" in capsys.readouterr().err
    assert not (study_folder / "tracked").exists()


@pytest.mark.parametrize("target", ["optuna", "tensorboard"])
def test_torch_and_ray_are_not_needed(target: str, study_folder: Path) -> None:
    write_tried(study_folder)
    script = (
        "import sys\nfrom frostline.cli import main\n"
        f"status = main(['track', {str(study_folder)!r}, '--to', {target!r}])\n"
        "print(status, [name for name in ('torch', 'ray', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
