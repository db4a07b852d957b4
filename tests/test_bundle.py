"""Bundles: they load in a fresh process to the logits that were scored, and refuse what does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import frostline
from frostline import results
from frostline.bundle import BundleError, load_bundle
from frostline.commit import publish_folder, verify_folder
from frostline.features import Feed
from frostline.images import BadImage
from frostline.testing import toy_job
from frostline.trial import run_trial
from frostline.world import World

READ = """
import sys, numpy as np, torch
import frostline
from frostline.data import load_data
before = torch.get_num_threads()
bundle = frostline.load_bundle(sys.argv[1])
data = load_data(bundle.spec.data, bundle.spec.seeds.split)
found = bundle.predict(data.inputs[data.indices("test")])
np.save(sys.argv[2], found.probabilities)
assert found.labels == [bundle.classes[label] for label in found.logits.argmax(axis=1)]
assert torch.get_num_threads() == before, "as it was"
assert "ray" not in sys.modules
"""


KINDS = {
    "frozen": {"freeze.norm": "frozen"},
    "recalibrate": {"freeze.norm": "recalibrate"},
    "batch": {"freeze.norm": "batch"},
    "head at 2": {"head.depth": [2], "head.hidden": 8, "head.init": "probe"},
    "only a head at 1": {"freeze.depth": [3], "head.depth": [1]},
    "rounded at 1": {},
    "rounded, only a head at 2": {"freeze.depth": [3], "head.depth": [2]},
}
ROUNDED = {"dtype": "float16", "cache": "none"}


@pytest.fixture(scope="module", params=KINDS)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    space = {"freeze.depth": [1], "train.lr": 1e-3, "train.head_lr": 1e-2, **KINDS[request.param]}
    arms = {"freeze": {"strategy": "freeze_depth", "space": space}}
    sections = {"features": ROUNDED} if request.param.startswith("rounded") else {}
    folder = tmp_path_factory.mktemp("bundle") / "study"
    job = toy_job(folder, ["search.trials=1", "confirm.seeds=2"], arms=arms, **sections)
    return frostline.search(job, inline=True)


def test_a_bundle_predicts_in_a_fresh_process_what_was_scored(study: Path, tmp_path: Path) -> None:
    assert verify_folder(study / "bundle") == []
    found = tmp_path / "found.npy"
    subprocess.run([sys.executable, "-c", READ, str(study / "bundle"), str(found)], check=True)
    np.testing.assert_array_equal(np.load(found), predicted_of(study))


def predicted_of(study: Path) -> np.ndarray:
    """(n, C) probabilities of the bundle's trial on test, as the study has them."""
    trial = load_bundle(study / "bundle").spec.trial_id
    rows = [row for row in results.read_predictions(study).to_pylist() if row["trial_id"] == trial]
    return np.array([row["probabilities"] for row in rows], np.float32)


def test_images_come_in_many_forms(study: Path, tmp_path: Path) -> None:
    bundle = load_bundle(study / "bundle")
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    image = Image.fromarray(grey)
    image.save(tmp_path / "one.png")
    raw = (tmp_path / "one.png").read_bytes()
    forms = [str(tmp_path / "one.png"), tmp_path / "one.png", raw, image, grey, np.stack([grey] * 3, axis=2)]
    found = bundle.predict(forms)
    np.testing.assert_array_equal(found.logits, found.logits[:1].repeat(len(forms), axis=0))
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(len(forms)), abs=1e-6)
    assert bundle.predict([]).probabilities.shape == (0, 10)
    many = bundle.predict([grey] * 65)
    np.testing.assert_array_equal(many.logits[64], many.logits[0])


def test_an_image_that_cannot_be_used_is_named(study: Path, tmp_path: Path) -> None:
    bundle = load_bundle(study / "bundle")
    for image, said in (
        (tmp_path / "missing.png", f"{tmp_path / 'missing.png'}: missing"),
        (b"nothing", "image 0: not an image"),
        (np.zeros((4, 4, 3)), r"image 0: an array \[4, 4, 3\] of float64"),
    ):
        with pytest.raises(BadImage, match=said):
            bundle.predict([image])


def test_its_card_is_one_for_the_hub(study: Path) -> None:
    text = (study / "bundle" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    about = json.loads((study / "bundle" / "bundle.json").read_text())
    assert card["library_name"] == "frostline"
    assert card["base_model"] == about["spec"]["backbone"]["name"]
    (result,) = card["model-index"][0]["results"]
    scores = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert scores == {name: round(about["scores"][f"test_{name}"], 6) for name in card["metrics"]}
    assert f"| test | {about['scores']['n_test']} |" in body
    assert "frostline predict bundle digits --split test" in body


def test_its_training_can_be_run_again(study: Path) -> None:
    bundle = load_bundle(study / "bundle")
    spec = bundle.spec.model_copy(update={"cached": False, "start_stored": False})
    outcome = run_trial(spec, feed=Feed(), world=World.here(spec.resources), report=lambda _: True)
    again = np.array([row["probabilities"] for row in outcome.predictions])
    np.testing.assert_allclose(again, predicted_of(study), atol=1e-5)


def test_the_bundle_is_the_best_confirmation_by_validation(study: Path) -> None:
    about = json.loads((study / "bundle" / "bundle.json").read_text())
    confirmed = [row for row in results.read_trials(study).to_pylist() if row["round"] == "confirm"]
    assert about["scores"]["val_score"] == max(row["val_score"] for row in confirmed)
    assert about["labels"] == [str(digit) for digit in range(10)]
    assert "| test |" in (study / "bundle" / "README.md").read_text()


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(tmp_path)


def test_a_bundle_of_another_backbone_is_refused(study: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (study / "bundle").iterdir() if path.name != "manifest.json"}
    about = json.loads(files["bundle.json"])
    for changed, said in (
        ({"weights_hash": "0" * 16}, "made on a backbone with weights 0000000000000000, but python:"),
        ({"format": 99}, "bundle format 99, and this version reads format 1"),
    ):
        publish_folder(tmp_path / "bundle", {**files, "bundle.json": json.dumps({**about, **changed}).encode()})
        with pytest.raises(BundleError, match=said):
            load_bundle(tmp_path / "bundle")


def test_a_flipped_bit_is_noticed(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "bundle", tmp_path / "bundle")
    weights = bytearray((tmp_path / "bundle" / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "bundle" / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match="its SHA-256 is not the manifest's"):
        load_bundle(tmp_path / "bundle")
