"""What was got wrong on test, and its pictures."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from _studies import write_study
from frostline.files import DataError
from frostline.mistakes import SIDE, WORST, confused, pictures, read_mistakes
from frostline.testing import image_folder


def test_mistakes_of_all_trials_are_counted_together(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": (0.9, 0.8)}, n_test=20)
    found = read_mistakes(study_folder, ["freeze-00000-c0", "freeze-00000-c1"], 2)
    assert found
    assert found.trials == 2
    assert found.counts.tolist() == [[34, 6], [0, 0]]
    assert [each["wrong"] for each in found.worst] == [2, 2, 1, 1]
    assert found.worst[0] == {
        "sample_id": "img/00018",
        "label": 0,
        "predicted": 1,
        "wrong": 2,
        "likely": pytest.approx(0.4),
    }
    assert read_mistakes(study_folder, ["nobody"], 2) is None


def test_only_the_worst_are_kept(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": (0.1,)}, n_test=200)
    found = read_mistakes(study_folder, ["freeze-00000-c0"], 2)
    assert found
    assert len(found.worst) == WORST


def test_of_many_classes_those_with_most_mistakes_are_shown(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": (0.5,)})
    found = read_mistakes(study_folder, ["freeze-00000-c0"], 5)
    assert found
    assert confused(found, 5) == [0, 1, 2, 3, 4]
    assert confused(found, 2) == [0, 1]


def test_pictures_are_read_from_the_data(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", per_class=3)
    asked = {"bars/000.png": "bars", "discs/001.png": "discs", "discs/002.png": "bars", "discs/009.png": "discs"}
    (root / "bars" / "000.png").write_bytes(b"no image")
    found = pictures({"path": str(root)}, asked)
    assert list(found) == ["discs/001.png"]  # one is broken, one has another class now, one is gone
    assert Image.open(BytesIO(found["discs/001.png"])).size == (SIDE, SIDE)
    with pytest.raises(DataError):
        pictures({"path": str(tmp_path / "gone")}, asked)


def test_pictures_of_what_has_no_files() -> None:
    found = pictures({"path": "digits"}, {"digits/0": "0"})
    assert Image.open(BytesIO(found["digits/0"])).size == (SIDE, SIDE)
