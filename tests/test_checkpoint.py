"""Interrupted anywhere and resumed, a training ends with the bits of one that ran through (P8)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from _freezing import EPOCHS, STRATEGIES, batches, freezing, network_of
from frostline.backbone import Backbone, load_backbone
from frostline.checkpoint import CheckpointError, Keep, load_training, save_training
from frostline.features import Feed
from frostline.outcome import EpochRecord, Outcome
from frostline.prepare import prepare
from frostline.spec import BackboneSpec, Freeze, Train
from frostline.testing import TOY_BACKBONE, toy_job
from frostline.training import Seeding, Training
from frostline.trial import run_trial
from frostline.trialspec import TrialSpec, configure, confirm_seeds, trial_of
from frostline.world import World

SAMPLES = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"clip_norm": 1.0},
    "sgd": {"optimizer": "sgd", "momentum": 0.9},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
    "averaged": {"ema": 0.9},
    "blended": {"wise": 0.5},
    "pulled": {"l2_sp": 0.1},
}


@pytest.fixture(scope="module")
def vit() -> Backbone:
    torch.set_num_threads(1)
    return load_backbone(BackboneSpec(name="timm/vit_tiny_patch16_224", weights="random"), image_size=32)


def training_of(backbone: Backbone, freeze: Freeze, **config: Any) -> Training:
    network, phases = network_of(backbone, freeze, dropout=0.3)
    data = batches(backbone.size, SAMPLES)
    return Training(
        network,
        phases,
        Train(epochs=EPOCHS, batch_size=4, lr=1e-3, **config),
        train=data,
        val=data,
        metric="nll",
        seeding=Seeding(3, 4),
        autocast=None,
    )


def run(training: Training) -> list[EpochRecord]:
    for _ in training.steps():
        pass
    return [dataclasses.replace(record, seconds=0.0, eval_seconds=0.0) for record in training.records]


def interrupted(training: Training, epoch: int, steps: int) -> bytes:
    """The checkpoint after this epoch, of a training that was left `steps` steps later."""
    walk = training.steps()
    while next(walk) is None or training.epoch < epoch:
        pass
    kept = save_training(training, "this")
    for _ in range(steps):
        next(walk)
    return kept


def tensors(training: Training) -> dict[str, Tensor]:
    return training.network.state_dict()


def check(backbone: Backbone, freeze: Freeze, epoch: int, steps: int, **config: Any) -> None:
    through, left, again = (training_of(backbone, freeze, **config) for _ in range(3))
    wanted = run(through)
    kept = interrupted(left, epoch, steps)
    torch.manual_seed(99)
    load_training(again, kept, "this")
    assert run(again) == wanted
    for name, tensor in tensors(through).items():
        assert torch.equal(tensor, tensors(again)[name]), name


@pytest.mark.fault(45)
@pytest.mark.parametrize("strategy", [each for each in STRATEGIES if each not in ("lora", "dora")])
def test_every_strategy_goes_on_to_the_bit(toy: Backbone, strategy: str) -> None:
    for epoch in range(1, EPOCHS):
        check(toy, freezing(strategy), epoch, steps=epoch % 3)


@pytest.mark.fault(45)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_so_does_every_strategy_of_a_transformer(vit: Backbone, strategy: str) -> None:
    check(vit, freezing(strategy), 2, steps=1)


@pytest.mark.fault(45)
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("strategy", ["gradual", "lp_ft"])
def test_every_way_to_train_goes_on_to_the_bit(toy: Backbone, strategy: str, config: dict[str, Any]) -> None:
    for epoch in range(1, EPOCHS):
        check(toy, freezing(strategy), epoch, steps=1, **config)


@pytest.fixture(scope="module")
def kept(toy: Backbone) -> bytes:
    return interrupted(training_of(toy, Freeze(strategy="full")), 1, 0)


@pytest.mark.fault(23)
@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_is_seen(kept: bytes, data: st.DataObject) -> None:
    at, bit = data.draw(st.integers(0, len(kept) - 1)), data.draw(st.integers(0, 7))
    hurt = bytearray(kept)
    hurt[at] ^= 1 << bit
    refused(bytes(hurt))


@pytest.mark.fault(22)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(found: bytes) -> None:
    refused(found)


def refused(found: bytes) -> None:
    toy = load_backbone(BackboneSpec(name=TOY_BACKBONE, weights="random"), image_size=16)
    with pytest.raises(CheckpointError, match="checkpoint"):
        load_training(training_of(toy, Freeze(strategy="full")), found, "this")


def test_it_is_of_one_training(toy: Backbone, kept: bytes) -> None:
    with pytest.raises(CheckpointError, match="another configuration"):
        load_training(training_of(toy, Freeze(strategy="full")), kept, "that")


# --- a whole trial ---


class Interruption(Exception):  # noqa: N818 (it is no error)
    pass


@pytest.fixture
def spec(tmp_path: Path) -> TrialSpec:
    job = prepare(toy_job(tmp_path / "study", ["train.epochs=4", "head.dropout=0.2"])).job
    config = configure(job, job.arms["freeze"].model_copy(update={"strategy": "gradual"}), {"train.lr": 1e-3})
    _, seeds = confirm_seeds(job, 0)
    return trial_of(
        job, config, seeds, trial_id="freeze-00000-c0", arm="freeze", number=0, round="confirm", seed=1, cached=False
    )


def ran(spec: TrialSpec, heard: list[EpochRecord], keep: Keep | None = None, stop_at: int | None = None) -> Outcome:
    def report(record: EpochRecord) -> bool:
        heard.append(record)
        if record.epoch == stop_at:
            raise Interruption
        return True

    return run_trial(spec, feed=Feed(), world=World.here(spec.resources), report=report, keep=keep)


def kept_in(path: Path) -> Keep:
    def load() -> bytes | None:
        return path.read_bytes() if path.exists() else None

    def save(data: bytes) -> None:
        path.write_bytes(data)

    return Keep(load, save)


def test_a_trial_goes_on_and_leaves_the_same_bundle(tmp_path: Path, spec: TrialSpec) -> None:
    through, heard, heard_again = ran(spec, []), [], []
    keep = kept_in(tmp_path / "checkpoint")
    with pytest.raises(Interruption):
        ran(spec, heard, keep, stop_at=3)
    again = ran(spec, heard_again, keep)
    assert [record.epoch for record in heard_again] == [1, 2, 3, 4]
    assert heard_again[:2] == heard[:2], "what was saved after epoch 2 is told again, in the time that it took"
    assert again.bundle["model.safetensors"] == through.bundle["model.safetensors"]
    likely = ([list(row["probabilities"]) for row in outcome.predictions] for outcome in (again, through))
    assert next(likely) == next(likely)
    for name in ("epochs", "val_score", "best_epoch", "test_score", "audit", "images_forward", "stored_bytes"):
        assert again.row[name] == through.row[name], name


def test_a_checkpoint_of_another_trial_is_refused(tmp_path: Path, spec: TrialSpec) -> None:
    keep = kept_in(tmp_path / "checkpoint")
    with pytest.raises(Interruption):
        ran(spec, [], keep, stop_at=2)
    other = spec.model_copy(update={"seeds": spec.seeds.model_copy(update={"order": 5})})
    with pytest.raises(CheckpointError, match="another configuration"):
        ran(other, [], keep)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_trial_whose_checkpoint_is_damaged_begins_again_and_says_so(
    tmp_path: Path, spec: TrialSpec, damage: str
) -> None:
    """Matrix rows 22, 23. It is the only one that is kept, so there is none before it."""
    through, keep = ran(spec, []), kept_in(tmp_path / "checkpoint")
    with pytest.raises(Interruption):
        ran(spec, [], keep, stop_at=3)
    whole = bytearray((tmp_path / "checkpoint").read_bytes())
    whole[len(whole) // 2] ^= damage == "flip"
    (tmp_path / "checkpoint").write_bytes({"flip": whole, "cut": whole[:-1], "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match=r"freeze-00000-c0 begins again: .* checkpoint"):
        again = ran(spec, [], keep)
    assert again.bundle["model.safetensors"] == through.bundle["model.safetensors"]
    assert again.row["epochs"] == 4
