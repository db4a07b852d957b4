"""The catalogue: what every strategy keeps (P1-P6, P9-P11), its phases, rates and counts, and where strategies are the same."""

from __future__ import annotations

import copy
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

import frostline
from _freezing import EPOCHS, NEEDED, STRATEGIES, batches, freezing, network_of
from frostline import results
from frostline.backbone import Backbone, load_backbone
from frostline.bundle import load_bundle
from frostline.commit import publish_folder
from frostline.features import Feed
from frostline.freeze import (
    Applied,
    FreezeError,
    Network,
    apply_plan,
    compile_plan,
    enforce,
    fixed_hash,
    stage_rates,
    whole,
)
from frostline.outcome import EpochRecord
from frostline.spec import BackboneSpec, Freeze, Head, Train
from frostline.strategies import CATALOGUE, judged_epoch, phases_of, run_cuts
from frostline.testing import TOY_BACKBONE, toy_job
from frostline.training import Batches, RelativeNorms, Seeding, build_optimizer, predict, train_epochs
from frostline.trial import origin_of, run_trial
from frostline.trialspec import Config, configure, confirm_seeds, search_seeds, starting_point, trial_of
from frostline.world import World

FAMILIES = {TOY_BACKBONE: 16, "timm/resnet10t": 32, "timm/tf_efficientnet_lite0": 32, "timm/vit_tiny_patch16_224": 32}
SAMPLES = 8


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Backbone:
    torch.set_num_threads(1)
    return load_backbone(BackboneSpec(name=request.param, weights="random"), image_size=FAMILIES[request.param])


def skip_where_nothing_can_be_adapted(backbone: Backbone, strategy: str) -> None:
    if backbone.name == TOY_BACKBONE and strategy in ("lora", "dora"):
        pytest.skip("it has no linear layer and no 1x1 convolution")


def train(network: Network, phases: list[Applied], size: int, **settings: Any) -> list[EpochRecord]:
    config = Train(**{"epochs": EPOCHS, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.1, **settings})
    data = batches(size, SAMPLES)
    return list(
        train_epochs(network, phases, config, train=data, val=data, metric="nll", seeding=Seeding(0, 0), autocast=None)
    )


def tensors(network: Network) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def moved(before: dict[str, Tensor], network: Network) -> set[str]:
    return {name for name, tensor in network.state_dict().items() if not torch.equal(before[name], tensor)}


# --- the contract ---


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_moves_what_it_says_and_nothing_else(family: Backbone, strategy: str) -> None:
    """Masks, optimizer and gradients agree in every phase, or training raises; what no phase trains is bit-equal after all."""
    skip_where_nothing_can_be_adapted(family, strategy)
    network, phases = network_of(family, freezing(strategy))
    everything = whole(phases)
    before, held = tensors(network), fixed_hash(network, everything)
    records = train(network, phases, FAMILIES[family.name], clip_norm=1.0)
    assert [record.epoch for record in records] == [*range(1, EPOCHS + 1)]
    assert fixed_hash(network, everything) == held
    changed = moved(before, network)
    assert not changed & everything.fixed
    assert any(name.startswith("head.") for name in changed)
    parameters = {name for name, _ in network.named_parameters()}
    assert parameters == set(everything.trained) | (everything.fixed & parameters)
    if strategy != "auto_rgn":  # which leaves a tensor without gradient alone, decay included
        assert set(everything.trained) <= changed | {name for name in parameters if "bias" in name or "norm" in name}


@pytest.mark.parametrize("strategy", [each for each in STRATEGIES if each not in ("lora", "dora")])
def test_a_strategy_repeats_exactly_and_survives_json(toy: Backbone, strategy: str) -> None:
    again = Freeze.model_validate_json(freezing(strategy).model_dump_json())
    assert again == freezing(strategy)
    first, second = (network_of(toy, freeze) for freeze in (freezing(strategy), again))
    assert train(*first, 16)[-1].val == train(*second, 16)[-1].val
    assert not moved(tensors(first[0]), second[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_trial_of_each_strategy_leaves_a_bundle_that_predicts_as_it_did(tmp_path: Path, strategy: str) -> None:
    """The whole spine: a confirmation, its row, and its bundle, which a fresh network takes to the same logits."""
    values = {f"freeze.{key}": value for key, value in NEEDED.get(strategy, {}).items()}
    job = toy_job(
        tmp_path / "study",
        ["data.per_class=4", "backbone.name=timm/resnet10t", "data.image_size=32"],
        arms={"a": {"strategy": strategy, "space": values}},
    )
    config, (_, seeds) = configure(job, job.arms["a"], {}), confirm_seeds(job, 0)
    spec = trial_of(job, config, seeds, trial_id="a", arm="a", number=0, round="confirm", seed=0)
    outcome = run_trial(spec, feed=Feed(), world=World.here(job.resources), report=lambda _: True)
    assert (outcome.row["status"], outcome.row["audit"], outcome.row["strategy"]) == ("complete", "passed", strategy)
    folder = tmp_path / "bundle"
    folder.mkdir()
    publish_folder(folder / "it", outcome.bundle)
    bundle = load_bundle(folder / "it")
    assert bundle.spec == spec
    origin = origin_of(spec, World.here(job.resources))
    test = origin.dataset.indices("test")
    read = Batches(Feed().inputs(origin), test, torch.from_numpy(origin.dataset.labels[test]))
    found = torch.from_numpy(predict(bundle.network, read)).softmax(1).numpy()
    np.testing.assert_allclose(found, [row["probabilities"] for row in outcome.predictions], atol=1e-5)


# --- phases ---


def test_gradual_unfreezes_a_stage_every_few_epochs() -> None:
    """ULMFiT's table: the head, then one stage more from the last to the first, the last phase taking what is left."""
    phases = phases_of(freezing("gradual", every=2), 0, 3, 9)
    assert [(sorted(phase.rates), phase.epochs) for phase in phases] == [([], 2), ([2], 2), ([1, 2], 2), ([0, 1, 2], 3)]
    assert not any(phase.restart for phase in phases)
    short = phases_of(freezing("gradual", every=2), 0, 3, 5)
    assert [(sorted(phase.rates), phase.epochs) for phase in short] == [([], 2), ([2], 2), ([1, 2], 1)]
    assert [sorted(phase.rates) for phase in phases_of(freezing("gradual", depth=2), 2, 3, 9)] == [[], [2]]


@pytest.mark.parametrize(("share", "alone"), [(None, 5), (0.0, 0), (0.3, 3), (1.0, 10)])
def test_lp_ft_trains_the_head_alone_first(share: float | None, alone: int) -> None:
    keys = {} if share is None else {"probe_share": share}
    found = [(sorted(phase.rates), phase.epochs) for phase in phases_of(freezing("lp_ft", **keys), 1, 3, 10)]
    assert found == [(stages, epochs) for stages, epochs in (([], alone), ([1, 2], 10 - alone)) if epochs]


def test_phase_two_of_lp_ft_starts_where_the_probe_ended(toy: Backbone) -> None:
    """The head after phase 1 is the linear probe's to the bit, with its cosine to the end; so are the logits then."""
    probe, (alone,) = network_of(toy, freezing("linear_probe"), 2)
    train(probe, [alone], 16, epochs=2)
    both, phases = network_of(toy, freezing("lp_ft"), EPOCHS)
    records = train(both, phases, 16)
    assert [record.phase for record in records] == [0, 0, 1, 1]
    again, phases = network_of(toy, freezing("lp_ft", probe_share=1.0), 2)
    train(again, phases, 16, epochs=2)
    assert not moved(tensors(probe), again)
    data = batches(16, SAMPLES)
    logits = predict(probe, data)
    assert records[1].val["nll"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), data.labels)), abs=1e-6
    )


LINEAR = """
import torch
from torch import nn

class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(50, 5, bias=False)
        nn.init.orthogonal_(self.linear.weight)

    def forward(self, images):
        return self.linear(images.flatten(1)[:, :50])

def features():
    torch.manual_seed(0)
    return {"module": Features(), "stages": [("linear", ["linear"])], "image_size": 5}
"""


def test_the_linear_theory_of_lp_ft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kumar et al. (2022), two linear layers: 50 inputs, 5 features that are perfect, 100 samples within a subspace of 15
    dimensions, targets of a head of unit length. The error off that subspace after gradient descent to a loss of zero is nothing
    for the probe and LP-FT; full fine-tuning distorts the features, from a random head with a mean of some 1.0, from a zero
    head of some 0.15."""
    (tmp_path / "linear_theory.py").write_text(LINEAR)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = BackboneSpec(name="python:linear_theory:features", weights="random")
    backbone = load_backbone(spec, image_size=5)
    errors: dict[str, list[float]] = {name: [] for name in ("linear_probe", "lp_ft", "full", "zero_head")}
    for draw in range(10):
        generator = torch.Generator().manual_seed(draw)
        subspace = torch.linalg.qr(torch.randn(50, 15, generator=generator)).Q
        inputs = torch.randn(100, 15, generator=generator) @ subspace.T
        truth = (
            torch.nn.functional.normalize(torch.randn(1, 5, generator=generator))
            @ backbone.module.linear.weight.detach()
        )
        start = torch.randn(1, 5, generator=generator) / 5**0.5
        for strategy, found in errors.items():
            network = Network(copy.deepcopy(backbone.module), torch.nn.Sequential(torch.nn.Linear(5, 1, bias=False)))
            with torch.no_grad():
                network.head[0].weight.copy_(start * (strategy != "zero_head"))  # pyright: ignore
            for phase in apply_plan(
                compile_plan(freezing(strategy), backbone.stages, epochs=EPOCHS), network, backbone
            ):
                descend(network, phase, inputs, inputs @ truth.T)
            learned = network.head[0].weight @ network.backbone.linear.weight  # pyright: ignore
            found.append((learned - truth).square().sum().item())
    mean = {strategy: float(np.mean(found)) for strategy, found in errors.items()}
    assert max(mean["linear_probe"], mean["lp_ft"]) < 1e-6
    assert 0.5 < mean["full"] < 1.7
    assert 0.1 < mean["zero_head"] < 0.22


def descend(network: Network, phase: Applied, inputs: Tensor, targets: Tensor) -> None:
    """Least squares by gradient descent over what this phase trains."""
    enforce(network, phase)
    images = torch.nn.functional.pad(inputs, (0, 25)).view(-1, 3, 5, 5)
    optimizer = torch.optim.SGD([each for each in network.parameters() if each.requires_grad], lr=0.4)
    for _ in range(800):
        optimizer.zero_grad()
        loss = (network(images) - targets).square().mean() / 2
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6, "at its minimum"


def test_moments_live_on_where_a_phase_does_not_begin_anew(toy: Backbone) -> None:
    network, phases = network_of(toy, freezing("gradual"))
    optimizer = build_optimizer(network, phases[0], Train())
    for parameter in network.head.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = build_optimizer(network, phases[1], Train(), optimizer)
    assert set(after.state) == set(network.head.parameters())


def test_nothing_is_judged_before_it_has_unfrozen_anything_and_warmed_up() -> None:
    config = Config(freeze=freezing("lp_ft", probe_share=0.5), head=Head(), train=Train(epochs=6))
    assert [judged_epoch(config, epoch) for epoch in range(1, 7)] == [0, 0, 0, 1, 2, 3]
    config = Config(freeze=freezing("gradual", every=2), head=Head(), train=Train(epochs=6))
    assert [judged_epoch(config, epoch) for epoch in range(1, 5)] == [0, 0, 1, 2]
    warm = Config(freeze=Freeze(), head=Head(), train=Train(epochs=30, warmup=0.1))
    assert [judged_epoch(warm, epoch) for epoch in (1, 3, 4, 30)] == [0, 0, 1, 27]
    short = Config(freeze=Freeze(), head=Head(), train=Train(epochs=9, warmup=0.1))
    assert judged_epoch(short, 1) == 1


def test_where_the_epochs_of_a_trial_began_to_train() -> None:
    lp_ft = Config(freeze=freezing("lp_ft", depth=1), head=Head(), train=Train(epochs=6))
    assert run_cuts(lp_ft, 4, 6) == {4: 3, 1: 3}
    assert run_cuts(lp_ft, 4, 2) == {4: 2, 1: 0}
    gradual = Config(freeze=freezing("gradual"), head=Head(depth=3), train=Train(epochs=6))
    assert run_cuts(gradual, 4, 6) == {3: 1, 2: 1, 1: 1, 0: 3}


# --- rates ---


def rates_of(toy: Backbone, strategy: str, **keys: Any) -> dict[str, float]:
    _, phases = network_of(toy, freezing(strategy, **keys))
    return stage_rates(phases[-1], toy.stages, 1.0, 1.0)


def test_rates_of_layer_decay_and_discriminative(toy: Backbone) -> None:
    assert rates_of(toy, "layer_decay", layer_decay=0.5) == {"stem": 0.25, "block1": 0.5, "block2": 1.0, "head": 1.0}
    geometric = {"stem": 0.01, "block1": 0.1, "block2": 1.0, "head": 1.0}
    assert rates_of(toy, "discriminative", lr_ratio=0.01) == pytest.approx(geometric)
    assert rates_of(toy, "layer_decay", layer_decay=1.0) == rates_of(toy, "full")


def test_the_step_taken_is_the_rate_of_the_stage(toy: Backbone) -> None:
    """Adam's first step is the learning rate itself, whatever the gradient: the ratios are seen on the weights."""
    network, phases = network_of(toy, freezing("discriminative", lr_ratio=0.01), 1)
    before = tensors(network)
    train(network, phases, 16, epochs=1, batch_size=SAMPLES, weight_decay=0.0, schedule="constant", warmup=0.0)
    step = {
        stage: float((before[name] - network.state_dict()[name]).abs().median())
        for stage, name in (("stem", "backbone.stem.0.weight"), ("block1", "backbone.block1.0.weight"))
    }
    assert step["block1"] / step["stem"] == pytest.approx(10, rel=0.05)


def test_surgical_trains_one_block(toy: Backbone) -> None:
    assert rates_of(toy, "surgical", depth=0) == {"stem": 1.0, "block1": 0.0, "block2": 0.0, "head": 1.0}
    assert rates_of(toy, "surgical", depth=1, span=2) == rates_of(toy, "freeze_depth", depth=1)
    assert rates_of(toy, "surgical", depth="all") == rates_of(toy, "linear_probe")


def test_rates_follow_relative_gradient_norms(toy: Backbone) -> None:
    """Finite, the largest 1, a tensor of zeros at 1: weights by hand for one step."""
    network, (applied,) = network_of(toy, freezing("auto_rgn", norm="affine"))
    optimizer = build_optimizer(network, applied, Train())
    relative = RelativeNorms(optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    relative.take()
    parameters = [group["params"][0] for group in relative.groups]
    found = [group["weight"] for group in relative.groups]
    ratios = [float(p.grad.norm() / p.detach().norm()) if p.detach().norm() else np.inf for p in parameters]
    largest = max(ratio for ratio in ratios if np.isfinite(ratio))
    assert found == pytest.approx([ratio / largest if np.isfinite(ratio) else 1.0 for ratio in ratios])
    assert np.inf in ratios  # the shifts of batch norm
    assert len(found) == sum(1 for name in applied.trained if name.startswith("backbone."))
    assert {group.get("weight", 1.0) for group in optimizer.param_groups if not group["relative"]} == {1.0}


# --- what a strategy trains ---


def test_norm_only_and_bias_only_train_the_published_numbers() -> None:
    """Lite0 has 42,016 parameters of norm layers, half of them shifts, and no other biases."""
    lite0 = load_backbone(BackboneSpec(name="timm/tf_efficientnet_lite0", weights="random"), image_size=32)
    for strategy, count in (("norm_only", 42_016), ("bias_only", 21_008)):
        network, (applied,) = network_of(lite0, freezing(strategy))
        trained = {name: network.get_parameter(name) for name in applied.trained if name.startswith("backbone.")}
        assert sum(parameter.numel() for parameter in trained.values()) == count


@pytest.mark.parametrize("strategy", ["lora", "dora"])
def test_adapters_start_at_the_base_and_merge_into_it(family: Backbone, strategy: str) -> None:
    skip_where_nothing_can_be_adapted(family, strategy)
    network, phases = network_of(family, freezing(strategy, rank=4))
    images = batches(FAMILIES[family.name], SAMPLES).fetch(np.arange(SAMPLES), 1)
    with torch.no_grad():
        expected = family.module.eval()(images)
        found = network.eval().backbone(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    train(network, phases, FAMILIES[family.name], lr=1e-2)
    with torch.no_grad():
        apart = network.eval().backbone(images)
        assert not torch.allclose(apart, expected, rtol=1e-3, atol=1e-3)
        for layer in network.modules():
            if isinstance(layer, LoraLayer):
                layer.merge()
        torch.testing.assert_close(network.backbone(images), apart, rtol=1e-3, atol=1e-3)


def test_adapters_of_lite0_are_on_its_1x1_convolutions() -> None:
    lite0 = load_backbone(BackboneSpec(name="timm/tf_efficientnet_lite0", weights="random"), image_size=32)
    network, _ = network_of(lite0, freezing("lora", depth=2))
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
    assert layers
    assert {tuple(layer.get_base_layer().kernel_size) for layer in layers} == {(1, 1)}
    assert not any(isinstance(layer, LoraLayer) for layer in network.backbone.blocks[0].modules())


def test_the_head_of_zero_head_is_zero(toy: Backbone) -> None:
    config = Config(freeze=Freeze(strategy="zero_head"), head=Head(), train=Train())
    assert config.head.init == "zero"
    with pytest.raises(ValidationError, match=r"starts at head\.init = 'zero', not 'probe'"):
        Config(freeze=Freeze(strategy="zero_head"), head=Head(init="probe"), train=Train())
    again = Config.model_validate_json(config.model_dump_json())
    assert again == config


def test_scratch_starts_from_random_weights_of_the_trials_own_seed(tmp_path: Path) -> None:
    job = toy_job(tmp_path, arms={"a": {"strategy": "scratch"}, "b": {"strategy": "full"}})
    scratch, full = (configure(job, job.arms[name], {}) for name in "ab")
    seeds = search_seeds(job, "a", 0)[1]
    assert scratch.freeze.norm == "batch"
    assert starting_point(job.backbone, full, seeds) == job.backbone
    start = starting_point(BackboneSpec(name="timm/resnet10t"), scratch, seeds)
    assert (start.weights, start.seed) == ("random", seeds.init)
    other = start.model_copy(update={"seed": seeds.init + 1})
    hashes = {load_backbone(spec, image_size=32).weights_hash for spec in (start, other)}
    assert len(hashes) == 2
    assert load_backbone(start, image_size=32).weights_hash in hashes


def test_tensors_that_stages_share_train_together_or_not_at_all(toy: Backbone) -> None:
    tied = copy.deepcopy(toy)
    tied.module.block2[0].bias = torch.nn.Parameter(torch.zeros(24))
    tied.module.block1[0].bias = tied.module.block2[0].bias
    with pytest.raises(FreezeError, match="both are one tensor; choose a freeze.depth"):
        network_of(tied, freezing("freeze_depth"))


# --- knobs that go with any strategy ---


def test_l2_sp_pulls_towards_the_pretrained_weights(toy: Backbone) -> None:
    far, near, plain = (network_of(toy, freezing("full")) for _ in range(3))
    train(*far, 16, l2_sp=0.0, optimizer="sgd", lr=0.05)
    train(*near, 16, l2_sp=5.0, optimizer="sgd", lr=0.05)
    train(*plain, 16, optimizer="sgd", lr=0.05)
    assert not moved(tensors(far[0]), plain[0])
    start = dict(toy.module.named_parameters())

    def distance(network: Network) -> float:
        return float(
            sum((p.detach() - start[n].detach()).square().sum() for n, p in network.backbone.named_parameters())
        )

    assert distance(near[0]) < 0.5 * distance(far[0])


def test_wise_lies_between_the_start_and_the_end(toy: Backbone) -> None:
    """0 is where the last phase began, 1 is plain training, to the bit, and scores are those of what is kept."""
    ends = {share: network_of(toy, freezing("lp_ft")) for share in (0.0, 0.5, 1.0)}
    records = {share: train(*end, 16, wise=share) for share, end in ends.items()}
    plain, phases = network_of(toy, freezing("lp_ft"))
    train(plain, phases, 16)
    assert not moved(tensors(plain), ends[1.0][0])
    probe, phases = network_of(toy, freezing("lp_ft", probe_share=1.0), 2)
    train(probe, phases, 16, epochs=2)
    assert not moved(tensors(probe), ends[0.0][0])
    for name, value in ends[0.5][0].named_parameters():
        between = torch.lerp(probe.get_parameter(name), plain.get_parameter(name), 0.5)
        torch.testing.assert_close(value, between)
    data = batches(16, SAMPLES)
    logits = torch.from_numpy(predict(ends[0.5][0], data))
    assert records[0.5][-1].val["nll"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, data.labels)), abs=1e-6
    )


# --- the catalogue itself ---


def test_every_strategy_is_in_the_catalogue_with_its_source() -> None:
    assert tuple(CATALOGUE) == STRATEGIES
    assert all(entry.about and entry.source for entry in CATALOGUE.values())


@pytest.mark.parametrize(
    ("strategy", "same", "keys"),
    [
        ("freeze_embed", "freeze_depth", {"depth": 1}),
        ("zero_head", "full", {}),
        ("layer_decay", "freeze_depth", {"depth": 0, "layer_decay": 0.5}),
        ("auto_rgn", "full", {}),
    ],
)
def test_strategies_that_train_the_same(toy: Backbone, strategy: str, same: str, keys: dict[str, Any]) -> None:
    _, phases = network_of(toy, freezing(strategy))
    _, others = network_of(toy, freezing(same, **keys))
    assert [phase.trained for phase in phases] == [phase.trained for phase in others]


def test_a_key_of_another_strategy_is_refused() -> None:
    with pytest.raises(ValidationError, match="rank is not for strategy = 'full'; it is for lora, dora"):
        Freeze(strategy="full", rank=4)
    with pytest.raises(ValidationError, match="strategy = 'norm_only' needs norm = affine or batch or recalibrate"):
        Freeze(strategy="norm_only", norm="frozen")
    with pytest.raises(ValidationError, match="ema and wise exclude each other"):
        Train(ema=0.9, wise=0.5)
    assert json.loads(Freeze(strategy="bias_only").model_dump_json())["norm"] == "affine"


def test_a_search_over_strategies_keeps_phases_and_budgets(tmp_path: Path) -> None:
    """Inline, on real images: phases are in the epochs' rows, those of a head alone cost less, and arms end with their steps."""
    space = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    arms = {
        "lp_ft": {"strategy": "lp_ft", "space": {**space, "freeze.depth": 1, "freeze.probe_share": 0.5}},
        "gradual": {"strategy": "gradual", "space": space},
        "full": {"strategy": "full", "space": space},
        "scratch": {"strategy": "scratch", "space": space},
    }
    options = ["train.epochs=4", "search.trials=40", "search.steps=128", "search.pruner.kind=none", "confirm.seeds=1"]
    job = toy_job(tmp_path / "study", [*options, "confirm.finalists=arms", "train.batch_size=25"], arms=arms)
    study = frostline.search(job, inline=True, console=Console(file=io.StringIO()))
    rows = [row for row in results.read_trials(study).to_pylist() if row["round"] == "search"]
    assert {row["status"] for row in rows} == {"complete"}
    assert Counter(row["arm"] for row in rows) == dict.fromkeys(arms, 2), "16 steps a trial, and 32 for each arm"
    phases: dict[str, list[int]] = {}
    for epoch in sorted(results.read_epochs(study).to_pylist(), key=lambda epoch: epoch["epoch"]):
        phases.setdefault(epoch["trial_id"], []).append(epoch["phase"])
    assert phases["lp_ft-00000"] == [0, 0, 1, 1]
    assert phases["gradual-00000"] == [0, 1, 2, 3]
    assert phases["full-00000"] == [0, 0, 0, 0]
    first = {row["arm"]: row for row in rows if row["number"] == 0}
    assert first["lp_ft"]["images_backward"] == 2 * first["lp_ft"]["n_train"]
    assert first["gradual"]["alone_s"] < first["full"]["alone_s"]
    assert first["full"]["alone_s"] == first["scratch"]["alone_s"]
    assert first["scratch"]["norm"] == "batch"
