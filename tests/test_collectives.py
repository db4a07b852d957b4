"""Several workers on a global batch are one worker on it: weights, scores, checkpoints, whoever computes what (P7)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from _freezing import EPOCHS, STRATEGIES, batches, freezing, network_of
from _workers import together
from frostline.backbone import Backbone, _load, load_backbone
from frostline.checkpoint import load_training, save_training
from frostline.collectives import full, shard, share, spanning_norms
from frostline.outcome import EpochRecord
from frostline.spec import BackboneSpec, Freeze, Train
from frostline.testing import TOY_BACKBONE
from frostline.training import Batches, Seeding, Training, predict
from frostline.world import ALONE, World

SAMPLES = 11  # batches of 4, 4 and 3, and of 3 workers one has a sample less, or none
Weights = dict[str, Tensor]


@given(st.integers(0, 100), st.integers(1, 20))
def test_every_sample_is_one_workers(size: int, workers: int) -> None:
    shares = [share(replace(ALONE, rank=rank, workers=workers), size) for rank in range(workers)]
    assert [row for own in shares for row in range(size)[own]] == list(range(size))
    sizes = [own.stop - own.start for own in shares]
    assert max(sizes) - min(sizes) <= 1


def backbone_of(name: str) -> Backbone:
    """In float64 and without dropout, whose noise is each worker's own."""
    torch.set_default_dtype(torch.float64)
    try:
        found = load_backbone(BackboneSpec(name=name, weights="random"), image_size=32)
        found = replace(found, module=copy.deepcopy(found.module).double())
    finally:
        torch.set_default_dtype(torch.float32)
        _load.cache_clear()
    for module in found.module.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return found


def training_of(world: World, name: str, freeze: Freeze, micro_batch: int | None, **config: Any) -> Training:
    backbone = backbone_of(name)
    network, phases = network_of(backbone, freeze, dropout=0.3)
    network.double()
    data = batches(backbone.size, SAMPLES)
    data = Batches(
        lambda samples, epoch: batches(32, SAMPLES).fetch(samples, epoch).double(), data.samples, data.labels
    )
    shard(world, network)
    return Training(
        network,
        phases,
        Train(**{"epochs": EPOCHS, "batch_size": 4, "lr": 1e-3, **config}),
        train=data,
        val=data,
        metric="nll",
        seeding=Seeding(3, 4),
        autocast=None,
        world=world,
        micro_batch=micro_batch,
    )


def run(training: Training) -> tuple[Weights, list[EpochRecord]]:
    for _ in training.steps():
        pass
    return weights_of(training), training.records


def weights_of(training: Training) -> Weights:
    return {name: full(tensor.detach()).clone() for name, tensor in training.network.state_dict().items()}


def trained(
    world: World, name: str, freeze: Freeze, micro_batch: int | None = None, **config: Any
) -> tuple[Weights, list[EpochRecord]]:
    return run(training_of(world, name, freeze, micro_batch, **config))


def same(found: tuple[Weights, list[EpochRecord]], wanted: tuple[Weights, list[EpochRecord]], tolerance: float) -> None:
    for name, tensor in wanted[0].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=tolerance, msg=name)
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=max(tolerance, 1e-6))  # summed in float32
        assert one.val == pytest.approx(other.val, abs=tolerance)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("strategy", [each for each in STRATEGIES if each not in ("lora", "dora", "scratch")])
def test_workers_train_what_one_trains(strategy: str, workers: int) -> None:
    freeze = freezing(strategy)
    wanted = trained(ALONE, TOY_BACKBONE, freeze)
    everyone = together(workers, trained, TOY_BACKBONE, freeze)
    for found in everyone:
        same(found, wanted, 1e-9)
        assert all(torch.equal(found[0][name], everyone[0][0][name]) for name in found[0])


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": "sgd"},
        {"clip_norm": 0.1},
        {"ema": 0.9},
        {"wise": 0.5},
        {"l2_sp": 0.1},
        {"class_weights": "balanced"},
    ],
    ids=str,
)
def test_so_they_do_with_everything_that_goes_by_gradients_or_weights(config: dict[str, Any]) -> None:
    freeze = freezing("full")
    wanted = trained(ALONE, TOY_BACKBONE, freeze, **config)
    for found in together(2, _with, TOY_BACKBONE, freeze, None, config):
        same(found, wanted, 1e-9)


def _with(
    world: World, name: str, freeze: Freeze, micro_batch: int | None, config: dict[str, Any]
) -> tuple[Weights, list[EpochRecord]]:
    return trained(world, name, freeze, micro_batch, **config)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 100])
def test_gradients_in_pieces_are_those_of_the_batch(micro_batch: int) -> None:
    freeze = freezing("lp_ft")
    same(trained(ALONE, TOY_BACKBONE, freeze, micro_batch), trained(ALONE, TOY_BACKBONE, freeze), 1e-9)


def test_so_are_those_of_workers() -> None:
    freeze = freezing("full")
    wanted = trained(ALONE, TOY_BACKBONE, freeze)
    for found in together(2, trained, TOY_BACKBONE, freeze, 1):
        same(found, wanted, 1e-9)


@pytest.mark.parametrize("strategy", ["full", "linear_probe", "gradual", "lp_ft", "auto_rgn", "norm_only"])
@pytest.mark.parametrize("name", [TOY_BACKBONE, "timm/vit_tiny_patch16_224"])
def test_workers_with_a_part_of_the_network_each_train_what_one_trains(name: str, strategy: str) -> None:
    freeze = freezing(strategy)
    wanted = trained(ALONE, name, freeze)
    for found in together(2, trained, name, freeze, 2, sharded=True):
        same(found, wanted, 1e-8)


@pytest.mark.parametrize(
    "config", [{"optimizer": "sgd"}, {"clip_norm": 0.1}, {"ema": 0.9}, {"wise": 0.5}, {"l2_sp": 0.1}], ids=str
)
def test_so_they_do_with_everything_that_goes_by_parts(config: dict[str, Any]) -> None:
    freeze = freezing("full")
    wanted = trained(ALONE, TOY_BACKBONE, freeze, **config)
    for found in together(2, _with, TOY_BACKBONE, freeze, None, config, sharded=True):
        same(found, wanted, 1e-9)


def resumed(world: World, freeze: Freeze, checkpoint: bytes | None) -> Any:
    """The state after two epochs, and what the training comes to; from a checkpoint, only that."""
    training = training_of(world, TOY_BACKBONE, freeze, None)
    if checkpoint:
        load_training(training, checkpoint, "this")
        return run(training)
    walk, kept = training.steps(), b""
    for record in walk:
        if record and record.epoch == 2:
            kept = save_training(training, "this")
    return kept, weights_of(training)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("strategy", ["full", "gradual"])
def test_workers_go_on_from_a_checkpoint_to_the_bit_and_so_does_another_number_of_them(
    strategy: str, sharded: bool
) -> None:
    freeze = freezing(strategy)
    (kept, wanted), _ = together(2, resumed, freeze, None, sharded=sharded)
    for found, _ in together(2, resumed, freeze, kept, sharded=sharded):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    alone, _ = resumed(ALONE, freeze, kept)
    for name, tensor in wanted.items():
        torch.testing.assert_close(alone[name], tensor, rtol=0, atol=1e-9, msg=name)


def predicted(world: World, samples: int) -> np.ndarray:
    backbone = backbone_of(TOY_BACKBONE)
    network, _ = network_of(backbone, freezing("full"))
    seen: list[int] = []

    def fetch(wanted: np.ndarray, epoch: int) -> Tensor:
        seen.extend(wanted)
        return batches(32, samples).fetch(wanted, epoch)

    return predict(network.float(), Batches(fetch, np.arange(samples), torch.zeros(samples)), world=world)


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("samples", [1, 63, 64, 65, 128, 200])
def test_each_sample_is_scored_once_whatever_the_number_of_workers(samples: int, workers: int) -> None:
    wanted = predicted(ALONE, samples)
    assert len(wanted) == samples
    for found in together(workers, predicted, samples):
        assert np.array_equal(found, wanted)


def test_live_norms_over_workers_are_refused_where_pytorch_has_none() -> None:
    with pytest.raises(ValueError, match=r'freeze\.norm = "batch" with scaling\.workers > 1'):
        spanning_norms(replace(ALONE, workers=2), nn.BatchNorm2d(3))
    assert type(spanning_norms(ALONE, nn.BatchNorm2d(3))) is nn.BatchNorm2d
