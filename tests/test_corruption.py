"""A flipped bit is told in every kind of file that is kept: 300 each, of which none is read as something else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import frostline
from _studies import interrupted
from frostline import results
from frostline.bundle import BundleError, load_bundle
from frostline.checkpoint import CheckpointError, opened
from frostline.claim import StudyMismatchError, record_job
from frostline.commit import DamagedFile, commit_part, read_table
from frostline.fsck import Found, _checkpoints
from frostline.parts import UNREADABLE, schema_of
from frostline.predict import predict_data
from frostline.results import table_of
from frostline.shards import FeatureError
from frostline.stages import BackboneError
from frostline.store import Store
from frostline.testing import image_folder, toy_backbone, toy_job
from frostline.weights import hash_tensors, hash_weights, load_weights, read_weights

FLIPS = 300
TOLD = (
    DamagedFile,
    results.NotAStudyError,
    BundleError,
    CheckpointError,
    FeatureError,
    BackboneError,
    StudyMismatchError,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study, its features beside it."""
    folder = tmp_path_factory.mktemp("made")
    options = ["search.trials=3", "confirm.seeds=1", "features.cache=all", f"features.path={folder / 'features'}"]
    frostline.search(toy_job(folder / "study", options), inline=True)
    return folder / "study"


def complaint(read: Callable[[], Any], value: Any) -> str | None:
    """What is told where something else would be read than this value."""
    try:
        found = read()
    except TOLD as error:
        return str(error)
    assert found == value, "a flip that nobody notices"
    return None


def check(path: Path, read: Callable[[], Any], named: str | None = None) -> int:
    """Flip a bit in each of FLIPS stretches of a file: it is told, with its name, or what is read is what was written. How often it
    was told."""
    whole, value, told = path.read_bytes(), read(), 0
    chance = random.Random(path.name)
    try:
        for number in range(FLIPS):
            low, high = (len(whole) * edge // FLIPS for edge in (number, number + 1))
            hurt = bytearray(whole)
            hurt[chance.randrange(low, max(high, low + 1))] ^= 1 << chance.randrange(8)
            path.write_bytes(hurt)
            said = complaint(read, value)
            assert said is None or (path.name if named is None else named) in said
            told += said is not None
    finally:
        path.write_bytes(whole)
    assert read() == value
    return told


@pytest.mark.parametrize("table", results.TABLES)
def test_parts(study: Path, table: str) -> None:
    path = next((study / table).glob("*.parquet"))
    assert check(path, lambda: results._read(study, table)) == FLIPS


def test_splits(study: Path) -> None:
    assert check(study / "splits.parquet", lambda: results.read_splits(study)) == FLIPS


def test_the_job(study: Path) -> None:
    """What lies between its values may change, its values may not."""
    assert check(study / "job.json", lambda: results.read_job(study)) > 0.9 * FLIPS


@pytest.mark.parametrize("file", ["model.safetensors", "bundle.json", "manifest.json", "README.md"])
def test_bundles(study: Path, file: str) -> None:
    """A manifest that is changed names another file, or no file that is there."""
    told = check(study / "bundle" / file, lambda: load_bundle(study / "bundle").id, str(study / "bundle"))
    assert told == FLIPS if file != "manifest.json" else told > 0.8 * FLIPS


@pytest.mark.parametrize("file", ["*.rows", "*.json"])
def test_stored_activations(study: Path, file: str) -> None:
    root = study.parent / "features"
    path = next(root.glob(f"*/{file}"))
    store = Store(root)

    def read() -> bytes:
        if problems := store.verify(path.parent.name):
            raise FeatureError("\n".join(problems))
        rows = store.open(path.parent.name)
        return rows.gather(rows.samples).tobytes()

    assert check(path, read, path.name[:16]) == FLIPS


def test_weights_of_a_known_hash(tmp_path: Path) -> None:
    """The study that was begun with them refuses others."""
    path, job = tmp_path / "backbone.safetensors", toy_job(tmp_path / "study")
    safetensors.torch.save_file(toy_backbone()["module"].state_dict(), path)

    def read() -> str:
        module = toy_backbone()["module"]
        load_weights(module, read_weights(path), str(path))
        found = hash_weights(module)
        record_job(job.folder, job, {"weights_hash": found}, results.SCHEMAS["splits"].empty_table())
        return found

    commit_part(job.folder, {results.RECORD: table_of(results.RECORD, [])}, 0)
    read()
    assert check(path, read, "") > 0.9 * FLIPS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a trial which was interrupted."""
    folder = tmp_path_factory.mktemp("kept") / "study"
    options = ["search.trials=0", "confirm.seeds=1", "scaling.checkpoint_s=0", "train.epochs=3", "features.cache=none"]
    with interrupted():
        frostline.search(toy_job(folder, options, arms={"full": {"strategy": "full"}}), inline=True)
    return folder / "checkpoints" / "full-00000-c0.safetensors"


def test_checkpoints(checkpoint: Path) -> None:
    """Trials refuse them, and fsck names them."""

    def read() -> str:
        _checkpoints(checkpoint.parent.parent, {}, found := Found(in_use=False))
        for problem in found.problems:
            with pytest.raises(CheckpointError):
                opened(checkpoint.read_bytes())
            raise CheckpointError(problem.file)
        return hash_tensors(opened(checkpoint.read_bytes())[0].items())

    assert check(checkpoint, read) == FLIPS


@pytest.fixture(scope="module")
def predicted(study: Path) -> Path:
    """Predictions of images, one of which cannot be read."""
    images = image_folder(study.parent / "images", per_class=6)
    (images / "bars" / "broken.png").write_bytes(b"\x89PNG broken")
    return predict_data(study / "bundle", str(images), study.parent / "said").folder


@pytest.mark.parametrize("table", ["predictions", "unreadable"])
def test_predictions(study: Path, predicted: Path, table: str) -> None:
    classes = load_bundle(study / "bundle").classes
    schema = schema_of(classes, features=False) if table == "predictions" else UNREADABLE
    path = next((predicted / table).glob("*.parquet"))
    assert check(path, lambda: read_table(predicted, table, "predictions", schema)) == FLIPS


def test_what_is_predicted(study: Path, predicted: Path) -> None:
    """Whatever of its description is changed, a prediction that goes on says so, or goes on as it was begun."""
    path, whole = predicted / "predict.json", (predicted / "predict.json").read_bytes()
    images, rows = str(study.parent / "images"), 12
    for at, bit in ((whole.index(b"samples"), 2), (whole.index(b": 13") + 3, 0), (0, 3), (len(whole) - 2, 7)):
        hurt = bytearray(whole)
        hurt[at] ^= 1 << bit
        path.write_bytes(hurt)
        with pytest.raises((ValueError, DamagedFile), match=str(predicted)):
            predict_data(study / "bundle", images, predicted)
    path.write_bytes(whole)
    assert predict_data(study / "bundle", images, predicted).predicted == rows
