"""Bundles: they load in a fresh process to the logits that were scored, and refuse what does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import frostline
from frostline import results
from frostline.bundle import BundleError, load_bundle
from frostline.commit import publish_folder, verify_folder
from frostline.spec import TrialSpec
from frostline.testing import toy_job

READ = """
import sys, numpy as np, torch
from frostline.bundle import load_bundle
from frostline.data import load_data
from frostline.features import Feed
from frostline.metrics import probabilities
from frostline.spec import TrialSpec
from frostline.training import Batches, predict
from frostline.trial import origin_of
from frostline.world import World
torch.set_num_threads(1)
network, about = load_bundle(sys.argv[1])
spec = TrialSpec.model_validate(about["spec"])
data = load_data(spec.data, spec.seeds.split)
images = Feed().inputs(origin_of(spec, World.here(spec.resources)))
test = data.indices("test")
np.save(sys.argv[2], probabilities(predict(network, Batches(images, test, torch.from_numpy(data.labels[test])))))
"""


KINDS = {
    "frozen": {"freeze.norm": "frozen"},
    "recalibrate": {"freeze.norm": "recalibrate"},
    "batch": {"freeze.norm": "batch"},
    "head at 2": {"head.depth": [2], "head.hidden": 8, "head.init": "probe"},
    "only a head at 1": {"freeze.depth": [3], "head.depth": [1]},
}


@pytest.fixture(scope="module", params=KINDS)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    space = {"freeze.depth": [1], "train.lr": 1e-3, "train.head_lr": 1e-2, **KINDS[request.param]}
    arms = {"freeze": {"strategy": "freeze_depth", "space": space}}
    job = toy_job(tmp_path_factory.mktemp("bundle") / "study", ["search.trials=1", "confirm.seeds=2"], arms=arms)
    return frostline.search(job, inline=True)


def test_a_bundle_predicts_in_a_fresh_process_what_was_scored(study: Path, tmp_path: Path) -> None:
    assert verify_folder(study / "bundle") == []
    found = tmp_path / "found.npy"
    subprocess.run([sys.executable, "-c", READ, str(study / "bundle"), str(found)], check=True)
    about = json.loads((study / "bundle" / "bundle.json").read_text())
    spec = TrialSpec.model_validate(about["spec"])
    rows = [row for row in results.read_predictions(study).to_pylist() if row["trial_id"] == spec.trial_id]
    np.testing.assert_array_equal(np.load(found), np.array([row["probabilities"] for row in rows], np.float32))


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
