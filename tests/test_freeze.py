"""Freezing: the properties of every plan (P1-P3, P5, P6, P9-P11, P13), on six families of networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from frostline.backbone import Backbone, load_backbone
from frostline.freeze import (
    FreezeError,
    Network,
    Plan,
    Rule,
    Table,
    apply_plan,
    check_gradients,
    check_masks,
    compile_plan,
    fixed_hash,
    is_norm,
    pretrained_names,
    stage_rates,
    train_mode,
)
from frostline.head import build_head
from frostline.spec import BackboneSpec, Freeze, Head, Train
from frostline.testing import toy_job
from frostline.training import Batches, Seeding, build_optimizer, recalibrate, train_epochs
from frostline.trialspec import confirm_seeds, search_seeds

FAMILIES = {
    "timm/resnet10t": 32,
    "timm/tf_efficientnet_lite0": 32,
    "timm/vit_tiny_patch16_224": 32,
    "timm/convnext_atto": 32,
    "timm/mobilenetv3_small_050": 32,
    "torchvision/resnet18": 32,
    "torchvision/densenet121": 32,
    "torchvision/mobilenet_v3_small": 32,
}
NORMS = ("frozen", "affine", "batch", "recalibrate")
CLASSES, SAMPLES = 3, 8


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Backbone:
    torch.set_num_threads(1)
    return load_backbone(BackboneSpec(name=request.param, weights="random"), image_size=FAMILIES[request.param])


def freezing(backbone: Backbone, depth: int, norm: str = "frozen", layer_decay: float = 1.0) -> Plan:
    freeze = Freeze(strategy="freeze_depth", depth=depth, norm=norm, layer_decay=layer_decay)
    return compile_plan(freeze, backbone.stages)


def network_of(backbone: Backbone, dropout: float = 0.0) -> Network:
    head = build_head(Head(dropout=dropout), backbone.feature_dim, CLASSES, seed=0)
    return Network(copy.deepcopy(backbone.module), head)


def batches(size: int, samples: int = SAMPLES) -> Batches:
    torch.manual_seed(1)
    images = torch.randn(samples, 3, size, size)
    return Batches(
        lambda wanted, _: images[torch.from_numpy(wanted)], np.arange(samples), torch.arange(samples) % CLASSES
    )


def train(network: Network, applied: object, size: int, **settings: object) -> None:
    config = Train(**{"epochs": 2, "batch_size": 4, "lr": 1e-2, "weight_decay": 0.1, **settings})
    data = batches(size)
    for _ in train_epochs(
        network,
        [applied],
        config,
        train=data,
        val=data,
        metric="accuracy",
        seeding=Seeding(0, 0),
        autocast=None,
    ):
        pass


def outputs(network: Network, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """What the named modules put out in one forward pass."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                found[name] = output.detach().clone()

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_training_moves_what_trains_and_nothing_else(family: Backbone, share: float, norm: str) -> None:
    """P1, P3, P9-P11: the audit passes, frozen tensors are bit-equal, every trained one has moved."""
    depth = round(share * len(family.stages))
    network = network_of(family)
    (applied,) = apply_plan(freezing(family, depth, norm), network, family)
    size = FAMILIES[family.name]
    if applied.recalibrated:
        recalibrate(network, applied, batches(size), seed=0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    hashed = fixed_hash(network, applied)
    train(network, applied, size)
    assert fixed_hash(network, applied) == hashed
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    still = {name for name, multiplier in applied.trained.items() if multiplier and name not in moved}
    assert not still
    assert not moved & applied.fixed
    statistics = {name for name in moved if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert moved - statistics <= set(applied.trained)
    assert bool(statistics) == (norm == "batch" and depth < len(family.stages) and has_statistics(family, depth))


def has_statistics(backbone: Backbone, depth: int) -> bool:
    return any(
        isinstance(module, nn.modules.batchnorm._NormBase) and backbone.module_stage[name] >= depth
        for name, module in backbone.module.named_modules()
    )


def test_a_frozen_prefix_in_training_gives_what_the_pretrained_network_gives(family: Backbone) -> None:
    """P2: bit-equal, module by module, with dropout, stochastic depth and batch statistics on wherever they may be."""
    depth = len(family.stages) // 2
    network, pretrained = network_of(family), network_of(family).eval()
    (applied,) = apply_plan(freezing(family, depth, "batch"), network, family)
    train_mode(network, applied)
    prefix = [
        f"backbone.{name}".rstrip(".")
        for name, stage in family.module_stage.items()
        if stage < depth and not any(family.module.get_submodule(name).children())
    ]
    images = torch.randn(4, 3, FAMILIES[family.name], FAMILIES[family.name])
    torch.manual_seed(2)
    live = outputs(network, prefix, images)
    reference = outputs(pretrained, prefix, images)
    assert len(live) > depth
    assert live.keys() == reference.keys()
    assert all(torch.equal(live[name], reference[name]) for name in live)


def test_frozen_stages_stay_in_eval_mode_whatever_calls_train(family: Backbone) -> None:
    """P3."""
    depth = len(family.stages) // 2
    network = network_of(family)
    (applied,) = apply_plan(freezing(family, depth, "batch"), network, family)
    network.train()
    train_mode(network, applied)
    frozen = {f"backbone.{name}".rstrip(".") for name, stage in family.module_stage.items() if stage < depth}
    live = {f"backbone.{name}".rstrip(".") for name, stage in family.module_stage.items() if stage >= depth}
    assert frozen
    assert not any(network.get_submodule(name).training for name in frozen)
    assert all(network.get_submodule(name).training for name in live)
    assert network.training
    assert network.head.training


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_freezing_later_holds_from_then_on(toy: Backbone, optimizer: str) -> None:
    """P5: momentum and weight decay from before do not move what is frozen now."""
    network = network_of(toy)
    train(network, *apply_plan(freezing(toy, 0), network, toy), 16, optimizer=optimizer)
    (applied,) = apply_plan(freezing(toy, 2), network, toy)
    assert all(parameter.grad is None for parameter in network.parameters())
    hashed = fixed_hash(network, applied)
    train(network, applied, 16, optimizer=optimizer)
    assert fixed_hash(network, applied) == hashed


def test_clipping_sees_trained_parameters_only(toy: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """P6."""
    network = network_of(toy)
    (applied,) = apply_plan(freezing(toy, 2), network, toy)
    clipped: list[set[int]] = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils,
        "clip_grad_norm_",
        lambda parameters, norm: (clipped.append({id(p) for p in parameters}), clip(parameters, norm)),
    )
    train(network, applied, 16, clip_norm=0.1)
    assert clipped
    assert all(seen == {id(network.get_parameter(name)) for name in applied.trained} for seen in clipped)


def test_the_audit_finds_a_parameter_that_is_in_no_group_or_in_two(toy: Backbone) -> None:
    """P9, P10."""
    network = network_of(toy)
    (applied,) = apply_plan(freezing(toy, 1), network, toy)
    optimizer = build_optimizer(network, applied, Train())
    check_masks(network, applied, optimizer)
    taken = optimizer.param_groups[0]["params"].pop()
    with pytest.raises(FreezeError, match="the optimizer and the freeze plan differ"):
        check_masks(network, applied, optimizer)
    optimizer.param_groups[0]["params"] += [taken, taken]
    with pytest.raises(FreezeError, match="in two optimizer groups"):
        check_masks(network, applied, optimizer)


def test_the_audit_finds_a_gradient_where_none_may_be(toy: Backbone) -> None:
    """P10, P11."""
    network = network_of(toy)
    (applied,) = apply_plan(freezing(toy, 1), network, toy)
    network.backbone.stem[0].weight.requires_grad_(True)
    with pytest.raises(FreezeError, match=r"requires_grad and the freeze plan differ on backbone\.stem\.0\.weight"):
        check_masks(network, applied, build_optimizer(network, applied, Train()))
    network(torch.randn(2, 3, 16, 16)).sum().backward()
    with pytest.raises(FreezeError, match=r"gradients and the freeze plan differ on backbone\.stem\.0\.weight"):
        check_gradients(network, applied)


def test_the_audit_finds_a_moved_buffer(toy: Backbone) -> None:
    """P1: a frozen batch norm whose statistics drift, as they do when only requires_grad is set."""
    network = network_of(toy)
    (applied,) = apply_plan(freezing(toy, 3), network, toy)
    hashed = fixed_hash(network, applied)
    network.train()
    network(torch.randn(4, 3, 16, 16))
    assert fixed_hash(network, applied) != hashed


@pytest.mark.parametrize(("depth", "cut"), [(0, 0), (1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("norm", ["frozen", "batch", "recalibrate"])
def test_stages_after_the_head_are_frozen_and_in_eval_mode(toy: Backbone, depth: int, cut: int, norm: Any) -> None:
    network, freeze = network_of(toy), Freeze(strategy="freeze_depth", depth=depth, norm=norm, layer_decay=0.5)
    plan = compile_plan(freeze, toy.stages, 2)
    (applied,) = apply_plan(plan, network, toy)
    assert (plan.cut, plan.end, plan.only_head) == (cut, 2, cut == 2)
    stages = {name.split(".")[1] for name in applied.trained if name.startswith("backbone.")}
    assert stages == set(["stem", "block1"][cut:])
    assert all(applied.trained[name] == 1.0 for name in applied.trained if name.startswith("backbone.block1"))
    assert "backbone.block2" in applied.eval_modules
    assert not any(name.startswith("backbone.block2") for name in applied.recalibrated)
    assert {name for name, _ in network.named_buffers() if name.startswith("backbone.block2")} <= applied.fixed


def test_first_matching_rule_wins_and_an_uncovered_parameter_is_an_error() -> None:
    table = Table((Rule("a/*", None), Rule("*/norm/*", 0.5), Rule("b/*", 1.0)), frozenset({1}))
    assert table.multiplier("a/norm/x") is None
    assert table.multiplier("b/norm/x") == 0.5
    assert table.multiplier("b/weight/x") == 1.0
    with pytest.raises(FreezeError, match="covers the parameter c/weight/x"):
        table.multiplier("c/weight/x")


def test_learning_rates_fall_by_layer_decay_towards_the_input(toy: Backbone) -> None:
    network = network_of(toy)
    (applied,) = apply_plan(freezing(toy, 1, "affine", layer_decay=0.5), network, toy)
    assert stage_rates(applied, toy.stages, 0.1, 1.0) == {"stem": 0.0, "block1": 0.05, "block2": 0.1, "head": 1.0}
    optimizer = build_optimizer(network, applied, Train(lr=0.1, head_lr=1.0))
    peaks = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert peaks[id(network.backbone.block1[0].weight)] == 0.05
    assert peaks[id(network.head[-1].weight)] == 1.0


def test_biases_and_norms_are_not_decayed(toy: Backbone) -> None:
    network = network_of(toy)
    (applied,) = apply_plan(freezing(toy, 0, "affine"), network, toy)
    optimizer = build_optimizer(network, applied, Train(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0), name


@pytest.mark.parametrize(("norm", "trained"), [("frozen", 0), ("affine", 2), ("batch", 2), ("recalibrate", 2)])
def test_norm_policy_says_what_of_a_norm_layer_trains(toy: Backbone, norm: str, trained: int) -> None:
    network = network_of(toy)
    (applied,) = apply_plan(freezing(toy, 2, norm), network, toy)
    assert len([name for name in applied.trained if name.startswith("backbone.block2.1.")]) == trained
    assert not any(name.startswith("backbone.block1") for name in applied.trained)
    assert applied.recalibrated == ({"backbone.block2.1"} if norm == "recalibrate" else set())
    assert ("backbone.block2.1.running_mean" in applied.fixed) == (norm != "batch")
    assert ("backbone.block2.1.running_mean" in pretrained_names(network, applied)) == (norm in ("frozen", "affine"))


def test_recalibration_gives_the_statistics_of_the_data(toy: Backbone) -> None:
    network = network_of(toy)
    (applied,) = apply_plan(freezing(toy, 0, "recalibrate"), network, toy)
    data = batches(16, samples=32)
    recalibrate(network, applied, data, seed=0)
    seen = network.backbone.stem[0](data.fetch(data.samples, 1))
    torch.testing.assert_close(network.backbone.stem[1].running_mean, seen.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(network.backbone.stem[1].running_var, seen.var(dim=(0, 2, 3)))
    assert network.backbone.stem[1].momentum == 0.1


def test_recalibration_does_not_depend_on_the_order_of_the_folder(toy: Backbone) -> None:
    """Samples sorted by class, far apart: a batch in that order would hold one class, and lack what lies between them."""
    images = torch.randn(256, 3, 16, 16) + 10 * torch.arange(256).div(128, rounding_mode="floor").view(-1, 1, 1, 1)
    data = Batches(
        lambda wanted, _: images[torch.from_numpy(wanted)], np.arange(256), torch.zeros(256, dtype=torch.long)
    )
    network = network_of(toy)
    (applied,) = apply_plan(freezing(toy, 0, "recalibrate"), network, toy)
    recalibrate(network, applied, data, seed=0)
    whole = network.backbone.stem[0](images).var(dim=(0, 2, 3))
    torch.testing.assert_close(network.backbone.stem[1].running_var, whole, rtol=0.05, atol=0.0)


def test_strategies_agree_where_they_are_the_same(toy: Backbone) -> None:
    """k = 0 is full fine-tuning, k = all is the linear probe."""
    assert compile_plan(Freeze(strategy="full"), toy.stages) == freezing(toy, 0)
    assert compile_plan(Freeze(strategy="full"), toy.stages, 3) == freezing(toy, 0)
    assert compile_plan(Freeze(strategy="linear_probe"), toy.stages) == freezing(toy, 3)
    assert compile_plan(Freeze(strategy="freeze_depth", depth="all"), toy.stages) == freezing(toy, 3)


def test_trainable_parameters_fall_with_freeze_depth(family: Backbone) -> None:
    counts = []
    for depth in range(len(family.stages) + 1):
        network = network_of(family)
        (applied,) = apply_plan(freezing(family, depth, "affine"), network, family)
        counts.append(sum(network.get_parameter(name).numel() for name in applied.trained))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == sum(parameter.numel() for parameter in network_of(family).parameters())
    assert counts[-1] == sum(parameter.numel() for parameter in network_of(family).head.parameters())


def test_lite0_has_its_published_norm_parameters() -> None:
    backbone = load_backbone(BackboneSpec(name="timm/tf_efficientnet_lite0", weights="random"), image_size=32)
    norms = [module for module in backbone.module.modules() if is_norm(module)]
    assert sum(parameter.numel() for norm in norms for parameter in norm.parameters()) == 42_016


def test_random_streams_do_not_depend_on_the_strategy(tmp_path) -> None:
    """P13: the seeds of a trial follow from its arm's name and number only, and split, subset and order are shared."""
    job = toy_job(tmp_path)
    assert search_seeds(job, "freeze", 3) == search_seeds(toy_job(tmp_path, ["train.epochs=9"]), "freeze", 3)
    first, second = search_seeds(job, "freeze", 0)[1], search_seeds(job, "other", 5)[1]
    assert (first.split, first.subset, first.order) == (second.split, second.subset, second.order)
    assert first.head != second.head
    assert first.dropout != second.dropout
    confirmed = [confirm_seeds(job, index)[1] for index in range(3)]
    assert {seeds.split for seeds in confirmed} == {first.split}
    assert len({seeds.subset for seeds in confirmed} | {first.subset}) == 4
