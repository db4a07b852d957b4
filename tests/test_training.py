"""Training: schedules, batches, averages and what ends a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from frostline.backbone import load_backbone
from frostline.features import chunks
from frostline.freeze import Applied, Network, apply_plan, compile_plan
from frostline.head import build_head
from frostline.losses import balance, mean_loss
from frostline.seeds import derive_seed
from frostline.spec import BackboneSpec, Freeze, Head, Train
from frostline.testing import TOY_BACKBONE
from frostline.training import (
    Average,
    Batches,
    NonFiniteError,
    Seeding,
    build_optimizer,
    predict,
    rate_factor,
    train_epochs,
)


def toy(depth: int | str = 0, head: Head = Head()) -> tuple[Network, Applied]:  # noqa: B008
    backbone = load_backbone(BackboneSpec(name=TOY_BACKBONE, weights="random"), image_size=16)
    import copy

    network = Network(copy.deepcopy(backbone.module), build_head(head, 24, 3, seed=0))
    plan = compile_plan(Freeze(strategy="freeze_depth", depth=depth, norm="affine"), backbone.stages)
    (applied,) = apply_plan(plan, network, backbone)
    return network, applied


def data(samples: int = 30, poison: float = 0.0) -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 16, 16, generator=generator) + poison
    labels = torch.arange(samples) % 3
    images += labels.view(-1, 1, 1, 1)
    return Batches(lambda wanted, _: images[torch.from_numpy(wanted)], np.arange(samples), labels)


def run(network: Network, applied: Applied, config: Train, train: Batches | None = None, **seeding: int) -> list:
    train = train or data()
    streams = Seeding(**{"order": 0, "dropout": 0, **seeding})
    return list(
        train_epochs(
            network,
            [applied],
            config,
            train=train,
            val=data(),
            metric="accuracy",
            seeding=streams,
            autocast=None,
        )
    )


def test_rates_rise_linearly_and_fall_as_half_a_cosine() -> None:
    config = Train(warmup=0.2, schedule="cosine")
    factors = [rate_factor(step, 10, config) for step in range(10)]
    assert factors[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 0.1
    assert [rate_factor(step, 4, Train(warmup=0.0, schedule="constant")) for step in range(4)] == [1.0] * 4


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_learns(optimizer: str) -> None:
    network, applied = toy()
    lr = {"adamw": 0.01, "sgd": 0.03}[optimizer]
    records = run(network, applied, Train(epochs=15, batch_size=8, optimizer=optimizer, lr=lr, head_lr=5 * lr))
    assert [record.epoch for record in records] == list(range(1, 16))
    assert records[-1].train_loss < 0.5 * records[0].train_loss
    assert records[-1].val_score > 0.9


def test_one_step_of_sgd_is_the_step_by_hand() -> None:
    """Applied rates, stage by stage, against autograd: w - lr * decay^k * (g + wd * w)."""
    network, applied = toy(1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    reference, reference_applied = toy(1)
    train = data(6)
    reference.train()
    for name in reference_applied.eval_modules:
        reference.get_submodule(name).training = False
    torch.manual_seed(derive_seed(0, "backbone", 1, 0))
    order = np.random.default_rng(0).permutation(6)
    loss = nn.functional.cross_entropy(reference(train.fetch(order, 1)), train.labels[order])
    loss.backward()
    config = Train(
        epochs=1, batch_size=6, optimizer="sgd", momentum=0, lr=0.1, head_lr=0.2, weight_decay=0.01, warmup=0
    )
    run(network, applied, config, train)
    for name, parameter in network.named_parameters():
        if name not in applied.trained:
            assert torch.equal(parameter, before[name])
            continue
        rate = 0.2 if name.startswith("head.") else 0.1
        decay = 0.0 if name in applied.undecayed else 0.01
        gradient = reference.get_parameter(name).grad
        torch.testing.assert_close(parameter.detach(), before[name] - rate * (gradient + decay * before[name]))


def test_a_rare_class_weighs_as_much_as_a_frequent_one() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    weights = balance(labels, 3, "classification")
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 4 / 3])
    logits = torch.tensor([[1.0, 0.0, 0.0]] * 4, requires_grad=True)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    mean_loss(logits, labels, "classification", 0.0, balance(labels, 2, "classification")).backward()
    by_hand = torch.autograd.grad((losses * torch.tensor([2 / 3, 2 / 3, 2 / 3, 2.0])).mean(), logits)[0]
    torch.testing.assert_close(logits.grad, by_hand)
    smoothed = mean_loss(logits, labels, "classification", 0.1, None)
    assert smoothed == nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


def test_balanced_weights_lift_the_recall_of_a_rare_class() -> None:
    few = data(40)
    rare = np.flatnonzero(few.labels.numpy() == 1)[:3]
    kept = np.sort(np.concatenate([np.flatnonzero(few.labels.numpy() != 1), rare]))
    train = Batches(few.fetch, kept, few.labels[torch.from_numpy(kept)])
    found = {}
    for weights in ("none", "balanced"):
        network, applied = toy()
        config = Train(epochs=6, batch_size=8, lr=0.01, head_lr=0.01, class_weights=weights)
        run(network, applied, config, train)
        logits = predict(network, data(40))
        found[weights] = (logits.argmax(1) == 1)[few.labels.numpy() == 1].mean()
    assert found["balanced"] > found["none"]


def test_order_and_dropout_are_streams_of_their_own() -> None:
    """P13: another dropout seed leaves the order of the mini-batches alone, and the other way round."""

    def watched(**seeding: int) -> tuple[list[int], float]:
        network, applied = toy(head=Head(dropout=0.5))
        batches = data()
        orders: list[int] = []

        def fetch(wanted: np.ndarray, epoch: int) -> torch.Tensor:
            orders.extend(wanted.tolist())
            return batches.fetch(wanted, epoch)

        records = run(
            network, applied, Train(epochs=1, batch_size=8), Batches(fetch, batches.samples, batches.labels), **seeding
        )
        return orders, records[0].train_loss

    base, same, dropout, order = watched(), watched(), watched(dropout=1), watched(order=1)
    assert base == same
    assert dropout[0] == base[0]
    assert dropout[1] != base[1]
    assert order[0] != base[0]
    assert sorted(base[0]) == list(range(30))


def test_a_loss_that_is_not_finite_ends_training() -> None:
    network, applied = toy()
    with pytest.raises(NonFiniteError, match="epoch 1 is nan"):
        run(network, applied, Train(epochs=2), data(poison=float("nan")))


def test_clipping_limits_the_step() -> None:
    moved = []
    for clip in (None, 1e-3):
        network, applied = toy()
        before = network.head[-1].weight.detach().clone()
        run(
            network,
            applied,
            Train(
                epochs=1,
                batch_size=30,
                optimizer="sgd",
                momentum=0,
                warmup=0,
                weight_decay=0,
                clip_norm=clip,
                head_lr=1,
            ),
        )
        moved.append(float((network.head[-1].weight - before).norm().detach()))
    assert moved[1] <= 1e-3 + 1e-6 < moved[0]


def test_the_average_follows_its_recursion() -> None:
    network, applied = toy()
    average = Average(network, applied.trained, decay=0.5)
    weight = network.head[-1].weight
    expected = weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            weight.add_(1.0)
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weight.detach()
    live = weight.detach().clone()
    with average.swapped_in():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), live)


def test_predictions_are_in_the_order_of_the_samples() -> None:
    network, _ = toy()
    batches = data(100)
    whole = predict(network, batches)
    some = predict(network, Batches(batches.fetch, np.array([7, 3]), batches.labels[[7, 3]]))
    np.testing.assert_allclose(whole[[7, 3]], some, atol=1e-6)
    assert not network.training


def test_every_trained_parameter_is_in_one_group_with_its_peak_rate() -> None:
    network, applied = toy()
    optimizer = build_optimizer(network, applied, Train(lr=1e-3, head_lr=1e-2, weight_decay=0.1))
    table = sorted((g["peak_lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups)
    assert [(lr, decay) for lr, decay, _ in table] == [(1e-3, 0.0), (1e-3, 0.1), (1e-2, 0.0), (1e-2, 0.1)]
    assert sum(count for *_, count in table) == len(applied.trained)


def test_chunks_cover_everything_once() -> None:
    assert [chunk.tolist() for chunk in chunks(np.arange(5), 2)] == [[0, 1], [2, 3], [4]]
