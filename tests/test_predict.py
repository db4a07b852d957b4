"""Predictions of a bundle for data: the trial's own numbers again, whatever is unreadable named, each part whole or not there."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

import frostline
from frostline import parts, predict, results
from frostline.bundle import Bundle, load_bundle
from frostline.cli import main
from frostline.commit import committed_parts
from frostline.files import DataError
from frostline.metrics import probabilities
from frostline.predict import PredictError, lines, predict_data, worth_ray
from frostline.testing import image_folder, toy_job

SPACE = {"freeze.depth": [1], "train.lr": 1e-3, "train.head_lr": 1e-2}
ARMS = {"freeze": {"strategy": "freeze_depth", "space": SPACE}}
SMALL = ["search.trials=1", "confirm.seeds=1"]
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study on digits."""
    return frostline.search(toy_job(tmp_path_factory.mktemp("predict") / "digits", SMALL, arms=ARMS), inline=True)


@pytest.fixture(scope="module")
def bundle(study: Path) -> Path:
    return study / "bundle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images, 15 a digit, two of them broken."""
    root = image_folder(tmp_path_factory.mktemp("data") / "photos", [str(digit) for digit in range(10)], per_class=15)
    (root / "3" / "004.png").write_bytes(b"no image")
    (root / "7" / "001.png").write_bytes(b"")
    return root


@pytest.fixture
def parts_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many samples in a part."""
    monkeypatch.setattr(parts, "MOST_IN_PART", 64)


def rows_in(out: Path) -> pa.Table:
    """Its predictions, as anybody reads them."""
    return pq.read_table(out / "predictions")


def test_the_studys_own_test_images_get_its_own_probabilities_to_the_bit(
    study: Path, bundle: Path, tmp_path: Path
) -> None:
    summary = predict_data(bundle, "digits", tmp_path / "out", split="test", console=QUIET)
    expected = results.read_predictions(study).to_pylist()
    found = rows_in(tmp_path / "out").to_pylist()
    assert [row["sample_id"] for row in found] == [row["sample_id"] for row in expected]
    np.testing.assert_array_equal(
        np.array([row["probabilities"] for row in found], np.float32),
        np.array([row["probabilities"] for row in expected], np.float32),
    )
    assert [row["predicted"] for row in found] == [str(row["predicted"]) for row in expected]
    (row,) = (row for row in results.read_trials(study).to_pylist() if row["round"] == "confirm")
    assert summary.scores == pytest.approx({name: row[f"test_{name}"] for name in summary.scores}, abs=1e-12)
    assert (summary.samples, summary.labelled, summary.unreadable) == (len(expected), len(expected), 0)


def test_a_split_is_one_that_the_data_or_the_bundle_knows(bundle: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="comes without test, and is no"):
        predict_data(bundle, str(folder), tmp_path / "out", split="test", console=QUIET)
    image_folder(tmp_path / "own" / "train", ["1", "2"], per_class=3)
    image_folder(tmp_path / "own" / "test", ["1", "2"], per_class=2)
    summary = predict_data(bundle, str(tmp_path / "own"), tmp_path / "out", split="test", console=QUIET)
    assert (summary.samples, summary.labelled) == (4, 4)


@pytest.mark.usefixtures("parts_of_64")
def test_what_cannot_be_read_is_listed_and_costs_nothing_beside_it(bundle: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = predict_data(bundle, str(folder), out, features=True, console=QUIET)
    assert (summary.samples, summary.predicted, summary.unreadable, summary.labelled) == (150, 148, 2, 148)
    assert committed_parts(out, "predictions") == [0, 1, 2]
    found = rows_in(out)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]
    assert found["sample_id"].to_pylist() == [name for name in names if name not in ("3/004.png", "7/001.png")]
    with (out / "unreadable.csv").open() as file:
        listed = {row["sample_id"]: row["reason"] for row in csv.DictReader(file)}
    assert listed["7/001.png"] == "empty: no bytes"
    assert listed["3/004.png"].startswith("not an image")
    loaded = load_bundle(bundle)
    rows = found.to_pylist()
    assert rows[0]["label"] == "0"
    assert {row["predicted"] for row in rows} <= set(loaded.classes)
    features = np.array([row["features"] for row in rows[:62]], np.float32)
    assert features.shape[1] == 24
    images = [folder / row["sample_id"] for row in rows[:62]]
    alone = loaded.predict(images)
    np.testing.assert_allclose(alone.probabilities, [row["probabilities"] for row in rows[:62]], atol=1e-6)
    assert rows[0]["loss"] == pytest.approx(-np.log(alone.probabilities[0, 0]), rel=1e-5)
    told = "\n".join(lines(summary))
    assert "148 of 150 samples predicted" in told
    assert "2 could not be read (1 x not an image, 1 x empty)" in told
    assert "on 148 labelled samples: accuracy" in told
    assert json.loads((out / "summary.json").read_text())["scores"] == summary.scores


def test_images_without_labels_and_one_image_alone(bundle: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (20, 30), "red").save(flat / "one.png")
    summary = predict_data(bundle, str(flat), tmp_path / "out", console=QUIET)
    assert (summary.predicted, summary.labelled, summary.scores) == (1, 0, {})
    (row,) = rows_in(tmp_path / "out").to_pylist()
    assert (row["sample_id"], row["label"], row["loss"]) == ("one.png", None, None)
    one = predict_data(bundle, str(flat / "one.png"), tmp_path / "alone", console=QUIET)
    assert one.predicted == 1
    assert rows_in(tmp_path / "alone").to_pylist() == [row]


def test_parquet_with_other_columns_and_unknown_labels(bundle: Path, tmp_path: Path) -> None:
    raw = io.BytesIO()
    Image.new("L", (9, 9), 200).save(raw, "PNG")
    images = [raw.getvalue(), None, raw.getvalue(), raw.getvalue()]
    file = tmp_path / "some.parquet"
    table = pa.table({"photo": pa.array(images, pa.binary()), "label": ["3", "4", "cat", None]})
    pq.write_table(table, file, row_group_size=2)
    with pytest.raises(DataError, match=r"data.image_column = 'image'.*no such column"):
        predict_data(bundle, str(file), tmp_path / "out", console=QUIET)
    summary = predict_data(bundle, str(file), tmp_path / "out", ["data.image_column=photo"], console=QUIET)
    assert (summary.predicted, summary.unreadable, summary.labelled, summary.foreign) == (3, 1, 1, {"cat": 1})
    assert rows_in(tmp_path / "out")["label"].to_pylist() == ["3", None, None]
    assert "no classes of this bundle, so not scored: 'cat' (1 samples)" in "\n".join(lines(summary))
    with pytest.raises(ValueError, match=r"'data.fit=squash': of the data section a prediction takes"):
        predict_data(bundle, str(file), tmp_path / "other", ["data.fit=squash"], console=QUIET)


def test_a_folder_of_something_else_is_refused(bundle: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        predict_data(bundle, str(folder), tmp_path / "mine", console=QUIET)
    out = tmp_path / "out"
    predict_data(bundle, str(folder), out, console=QUIET)
    with pytest.raises(ValueError, match=r"holds predictions of something else \(features was False, now True\)"):
        predict_data(bundle, str(folder), out, features=True, console=QUIET)
    with pytest.raises(ValueError, match="cannot live at a URI"):
        predict_data(bundle, str(folder), "s3://bucket/out", console=QUIET)


def test_nothing_readable_is_a_failure(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    with pytest.raises(PredictError, match="none of 1 samples could be read"):
        predict_data(bundle, str(tmp_path / "bad"), tmp_path / "out", console=QUIET)


SLOW = """
import sys, time
from frostline import parts, predict
parts.MOST_IN_PART = 64
commit = predict.commit_part
def slowly(*arguments):
    commit(*arguments)
    time.sleep(0.5)
predict.commit_part = slowly
predict.predict_data(sys.argv[1], "digits", sys.argv[2])
"""


@pytest.mark.fault(43)
@pytest.mark.usefixtures("parts_of_64")
def test_killed_twice_and_run_again_it_has_each_row_once(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(bundle), str(out)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while len(committed_parts(out, "predictions")) < seen + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(committed_parts(out, "predictions")) >= seen + 2
        seen = len(committed_parts(out, "predictions"))
    assert seen < 29
    before = {path: path.stat().st_mtime_ns for path in (out / "predictions").glob("part-*")}
    summary = predict_data(bundle, "digits", out, console=QUIET)
    assert (summary.predicted, len(committed_parts(out, "predictions"))) == (1797, 29)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()), "not done again"
    assert sorted(rows_in(out)["sample_id"].to_pylist()) == sorted(f"digits/{i}" for i in range(1797))
    whole = predict_data(bundle, "digits", tmp_path / "whole", console=QUIET)
    assert rows_in(tmp_path / "whole").equals(rows_in(out))
    assert summary.scores == whole.scores


def test_ray_is_for_what_takes_long_and_has_room() -> None:
    assert worth_ray(100_000, 100, places=2)
    assert not worth_ray(100_000, 100, places=1)
    assert not worth_ray(5_000, 100, places=64)


def test_a_batch_takes_at_most_half_of_the_memory() -> None:
    assert parts.fitting_batch(1e6, 80e9) == 1024
    assert parts.fitting_batch(1e8, 16e9) == 64
    assert parts.fitting_batch(1e9, 1e6) == 1


def test_parts_hold_full_batches() -> None:
    assert [len(part) for part in parts.parts_of(range(2500), 3 * 64**2)] == [1024, 1024, 452]
    assert [len(part) for part in parts.parts_of(range(500), 3 * 224**2)] == [192, 192, 116]
    assert [len(part) for part in parts.parts_of(range(65), 3 * 4096**2)] == [64, 1]
    assert parts.parts_of([], 64) == []


def test_a_batch_that_memory_does_not_hold_goes_in_halves(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    loaded, whole = load_bundle(bundle), Bundle.pass_through
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    expected = loaded.pass_through(pixels)[0]

    def small(self: Bundle, given: np.ndarray, *, fill: bool) -> tuple[np.ndarray, np.ndarray]:
        if len(given) > 16:
            raise torch.OutOfMemoryError
        return whole(self, given, fill=fill)

    monkeypatch.setattr(Bundle, "pass_through", small)
    halves = parts.pass_fitting(loaded, pixels)
    assert [len(logits) for logits, _ in halves] == [16] * 4
    np.testing.assert_allclose(np.concatenate([logits for logits, _ in halves]), expected, atol=1e-6)


def test_the_command(bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["predict", str(bundle), str(folder), "--out", out]) == 0
    said = capsys.readouterr()
    assert "148 of 150 samples predicted" in said.out
    assert main(["predict", str(bundle), str(folder), "--out", out]) == 0
    assert main(["predict", str(bundle), str(folder / "nowhere"), "--out", out]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_columns_of_probabilities_are_named_by_the_bundle(bundle: Path, tmp_path: Path) -> None:
    predict_data(bundle, "digits", tmp_path / "out", split="val", console=QUIET)
    about = json.loads((tmp_path / "out" / "predict.json").read_text())
    first = rows_in(tmp_path / "out").to_pylist()[0]
    assert first["predicted"] == about["classes"][int(np.argmax(first["probabilities"]))]
    assert probabilities(np.zeros((1, 10))).sum() == pytest.approx(1)
    assert predict.RECORD == "predictions"
