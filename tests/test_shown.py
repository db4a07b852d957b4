"""Images that are decoded anew are, byte for byte, those that are kept."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import frostline
from frostline import results, shown
from frostline.data import DataError, Dataset, load_data
from frostline.features import Feed
from frostline.shown import Shown
from frostline.spec import Data
from frostline.testing import image_folder, target_table, toy_training
from frostline.trial import origin_of
from frostline.world import World


def loaded(folder: Path, decoded: str = "anew", **data: object) -> Dataset:
    return load_data(Data.model_validate({"path": str(folder), "image_size": 16, "decoded": decoded, **data}), 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))  # what is kept already is not decoded anew
    return image_folder(tmp_path / "images", per_class=20)


def test_rows_are_those_that_are_kept(folder: Path) -> None:
    anew, kept = loaded(folder), loaded(folder, "kept")
    assert isinstance(anew.inputs, Shown)
    assert isinstance(kept.inputs, np.ndarray)
    assert (anew.inputs.shape, anew.inputs.dtype, len(anew.inputs)) == (kept.inputs.shape, kept.inputs.dtype, 40)
    assert (anew.inputs_hash, anew.data_hash, anew.split_hash) == (kept.inputs_hash, kept.data_hash, kept.split_hash)
    order = np.random.default_rng(0).permutation(40)
    for expected in (order[:0], order, order[::-1]):
        anew.inputs.expect(expected)
        for part in np.array_split(order, 7):
            np.testing.assert_array_equal(anew.inputs[part], kept.inputs[part])


def test_what_is_expected_is_made_ahead_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, made = loaded(folder).inputs, []
    assert isinstance(rows, Shown)
    make = rows._row

    def counted(number: int) -> np.ndarray:
        made.append(number)
        return make(number)

    monkeypatch.setattr(rows, "_row", counted)
    monkeypatch.setattr(shown, "AHEAD", 8)
    order = np.random.default_rng(0).permutation(40)
    rows.expect(order)
    rows._threads.shutdown(wait=True)
    assert sorted(made) == sorted(order[:8].tolist())
    del rows._threads
    for part in np.array_split(order, 5):
        rows[part]
    assert sorted(made) == list(range(40))
    rows[order[:3]]
    assert len(made) == 43, "nobody expected these"


def test_images_that_cannot_be_decoded_are_known_from_the_start(folder: Path) -> None:
    (folder / "bars" / "005.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"bars/005\.png"):
        loaded(folder)
    anew, kept = loaded(folder, on_bad="exclude"), loaded(folder, "kept", on_bad="exclude")
    assert anew.excluded == kept.excluded
    assert anew.excluded[0][0] == "bars/005.png"
    every = np.arange(39)
    np.testing.assert_array_equal(anew.inputs[every], kept.inputs[every])


def test_an_image_that_changes_is_named(folder: Path) -> None:
    rows = loaded(folder).inputs
    Image.new("RGB", (24, 24)).save(folder / "bars" / "003.png")
    (folder / "discs" / "004.png").unlink()
    with pytest.raises(DataError, match=r"bars/003\.png is not what it was when the data was read first"):
        rows[np.arange(3, 5)]
    with pytest.raises(DataError, match=r"discs/004\.png"):
        rows[np.arange(24, 26)]


def test_what_lies_in_few_files_is_refused(tmp_path: Path) -> None:
    table = target_table(tmp_path / "t.parquet", "regression", 20)
    with pytest.raises(
        DataError, match=r'decoded = "anew" reads samples in any order, and .*t\.parquet keeps many in a file'
    ):
        loaded(table, task="regression")
    with pytest.raises(DataError, match="digits keeps many in a file"):
        load_data(Data(path="digits", image_size=16, decoded="anew"), 0)


def test_a_training_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    found = {}
    for decoded in ("kept", "anew"):
        data = {"path": str(folder), "image_size": 16, "decoded": decoded}
        job = toy_training(tmp_path / decoded, data=data, freeze={"strategy": "full", "norm": "recalibrate"})
        study = frostline.train(job, inline=True)
        (row,) = results.read_trials(study).to_pylist()
        found[decoded] = [*results.read_epochs(study)["train_loss"].to_pylist(), row["val_nll"], row["test_nll"]]
    assert found["kept"] == found["anew"]


def test_stored_activations_are_shared_by_both(folder: Path, tmp_path: Path) -> None:
    data = {"path": str(folder), "image_size": 16}
    jobs = [toy_training(tmp_path / name, data={**data, "decoded": name}) for name in ("kept", "anew")]
    keys = []
    for job in jobs:
        from frostline.prepare import prepare
        from frostline.probing import spec_of

        origin = origin_of(spec_of(prepare(job).job, "fp32"), World.here(job.resources))
        keys.append(origin.about(1, None))
        assert Feed().inputs(origin)(np.arange(4), 1).shape == (4, 3, 16, 16)
    assert keys[0] == keys[1]
