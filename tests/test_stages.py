"""Stages are checked against what a forward pass does, on real architectures with random weights and small images."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frostline.stages import (
    BackboneError,
    Stage,
    complete_groups,
    forward_groups,
    lone_activations,
    make_stages,
    module_stages,
    named_tensors,
    record,
    stage_costs,
)


def cut_up(module: nn.Module, side: int) -> tuple[tuple[Stage, ...], dict[str, int]]:
    recording = record(module, torch.rand(2, 3, side, side))
    groups = complete_groups(module, recording, forward_groups(recording))
    stages = make_stages(module, recording, groups)
    return stages, module_stages(module, recording, stages)


def without_classifier(model: nn.Module, name: str) -> nn.Module:
    model.set_submodule(name, nn.Identity())
    return model


def small_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.5
    )
    model.encoder.layers[1].self_attention.dropout = 0.5
    return without_classifier(model, "heads.head")


class Shared(nn.Module):
    """Two blocks around one layer that both use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.both(self.b(self.both(self.a(images)))).mean((2, 3))


RANDOM = {
    "vit": lambda: timm.create_model(
        "test_vit",
        num_classes=0,
        img_size=32,
        pos_drop_rate=0.5,
        proj_drop_rate=0.5,
        attn_drop_rate=0.5,
        drop_path_rate=0.5,
    ),
    "efficientnet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=0, drop_path_rate=0.5),
    "torchvision vit": small_vit,
    "torchvision densenet": lambda: without_classifier(
        torchvision.models.DenseNet(8, (2, 2, 2), 16, drop_rate=0.5), "classifier"
    ),
    "torchvision convnext": lambda: without_classifier(
        torchvision.models.ConvNeXt(
            [
                torchvision.models.convnext.CNBlockConfig(8, 16, 2),
                torchvision.models.convnext.CNBlockConfig(16, 24, 2),
                torchvision.models.convnext.CNBlockConfig(24, None, 2),
            ],
            stochastic_depth_prob=0.7,
        ),
        "classifier.2",
    ),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_a_frozen_prefix_in_eval_mode_is_bit_equal_to_the_network_in_eval_mode(kind: str) -> None:
    side = 64 if "convnext" in kind else 32
    torch.manual_seed(0)
    module = RANDOM[kind]()
    stages, module_stage = cut_up(module, side)
    assert set(module_stage) == {name for name, _ in module.named_modules(remove_duplicate=False)}
    images = torch.rand(2, 3, side, side)
    modules = dict(module.named_modules(remove_duplicate=False))

    def outputs(cut: int, frozen: int, seed: int) -> dict[str, torch.Tensor]:
        """First output of every module below `cut`, with the first `frozen` stages in eval mode."""
        module.train()
        for name, stage in module_stage.items():
            modules[name].training = stage >= frozen
        seen: dict[str, torch.Tensor] = {}
        hooks = []
        for name, stage in module_stage.items():

            def keep(
                _: nn.Module, __: tuple, output: torch.Tensor | tuple[torch.Tensor, ...], name: str = name
            ) -> None:
                seen.setdefault(name, (output[0] if isinstance(output, tuple) else output).clone())

            if stage < cut:
                hooks.append(modules[name].register_forward_hook(keep))
        torch.manual_seed(seed)
        with torch.no_grad():
            module(images)
        for hook in hooks:
            hook.remove()
        return seen

    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for cut in range(1, len(stages) + 1):
        module.load_state_dict(state)
        plain = outputs(cut, len(stages), seed=1)
        frozen = outputs(cut, cut, seed=2)
        assert plain.keys() == frozen.keys()
        assert [name for name in plain if not torch.equal(plain[name], frozen[name])] == []
        after = module.state_dict()
        held = [name for stage in stages[:cut] for name in stage.tensors if name in after]
        assert [name for name in held if not torch.equal(after[name], state[name])] == []
    live, again = outputs(len(stages), 0, seed=1), outputs(len(stages), 0, seed=2)
    assert any(not torch.equal(live[name], again[name]) for name in live)


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("resnet18", 32, ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("vgg11", 32, ["features.0", "features.3", "features.6", "features.11", "features.16", "classifier"]),
        ("mobilenet_v3_small", 32, [*(f"features.{i}" for i in range(13)), "classifier"]),
        (
            "densenet121",
            32,
            [
                "features.conv0",
                *(f"features.{part}{i}" for i in (1, 2, 3) for part in ("denseblock", "transition")),
                "features.denseblock4",
            ],
        ),
        ("regnet_y_400mf", 32, ["stem", *(f"trunk_output.block{i}" for i in (1, 2, 3, 4))]),
        ("convnext_tiny", 32, [f"features.{i}" for i in range(8)]),
        ("shufflenet_v2_x0_5", 32, ["conv1", "stage2", "stage3", "stage4", "conv5"]),
        ("mnasnet0_5", 32, ["layers.0", *(f"layers.{i}" for i in range(8, 15))]),
    ],
)
def test_one_rule_cuts_torchvision_networks_where_a_reader_would(name: str, side: int, expected: list[str]) -> None:
    model = torchvision.models.get_model(name)
    last = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]
    stages, _ = cut_up(without_classifier(model, last), side)
    assert [stage.name for stage in stages] == expected
    assert sorted(t for stage in stages for t in stage.tensors) == sorted(name for name, _ in named_tensors(model))


def test_class_token_and_position_embedding_go_with_what_runs_at_their_use() -> None:
    stages, module_stage = cut_up(small_vit(), 32)
    assert [stage.name for stage in stages] == ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(3))]
    assert {"class_token", "encoder.pos_embedding"} <= set(stages[0].tensors)
    assert {"encoder.ln.weight", "encoder.ln.bias"} <= set(stages[3].tensors)
    assert module_stage["encoder.dropout"] == 0
    assert module_stage["encoder.layers.encoder_layer_1.self_attention"] == 2
    assert module_stage[""] == 3


def test_a_module_that_never_runs_lies_in_the_stage_around_it() -> None:
    _, module_stage = cut_up(timm.create_model("test_vit", num_classes=0, img_size=32), 32)
    assert module_stage["pos_drop"] == 0
    assert [module_stage[f"blocks.{i}.attn.attn_drop"] for i in range(4)] == [1, 2, 3, 4]


def test_costs_of_resnet18_are_the_known_ones() -> None:
    model = without_classifier(torchvision.models.resnet18(), "fc")
    stages, _ = cut_up(model, 64)
    costs = stage_costs(model, stages, torch.zeros(3, 3, 64, 64))
    assert [cost.parameters for cost in costs] == [9_536, 147_968, 525_568, 2_099_712, 8_393_728]
    convolution = 2 * 64 * 3 * 7 * 7 * 32 * 32  # output channels x input channels x kernel x output pixels
    assert costs[0].flops == convolution
    assert costs[1].flops == 4 * 2 * 64 * 64 * 3 * 3 * 16 * 16
    assert [cost.cut_bytes for cost in costs] == [
        4 * 64 * 16 * 16,
        4 * 64 * 16 * 16,
        4 * 128 * 8 * 8,
        4 * 256 * 4 * 4,
        4 * 512,
    ]
    assert sum(cost.parameter_share for cost in costs) == pytest.approx(1)
    assert sum(cost.flop_share for cost in costs) == pytest.approx(1)


def test_attention_counts_in_flops() -> None:
    module = small_vit()
    stages, _ = cut_up(module, 32)
    cost = stage_costs(module, stages, torch.zeros(1, 3, 32, 32))[1]
    tokens, width = 5, 16
    assert cost.flops == 2 * tokens * (4 * width * width + 2 * width * 32) + 2 * 2 * tokens * tokens * width
    assert cost.cut_bytes == 4 * tokens * width


def test_a_cut_through_two_streams_has_no_size() -> None:
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.stem(images)
            return (self.right(x) + self.left(x) + x).mean((2, 3))

    module = Streams()
    recording = record(module, torch.rand(2, 3, 8, 8))
    groups = [["stem.weight", "stem.bias"], ["right.weight", "right.bias"], ["left.weight", "left.bias"]]
    stages = make_stages(module, recording, groups)
    assert [stage.name for stage in stages] == ["stem", "right", "left"]
    assert [cost.cut_bytes for cost in stage_costs(module, stages, torch.rand(2, 3, 8, 8))] == [4 * 4 * 64, None, 4 * 4]


def test_recording_leaves_nothing_behind() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module[2].eval()
    before = {name: tensor.clone() for name, tensor in named_tensors(module)}
    record(module, torch.rand(2, 3, 8, 8))
    assert [child.training for child in module.modules()] == [True, True, True, False, True, True]
    assert not any(child._forward_pre_hooks or child._forward_hooks for child in module.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in named_tensors(module))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


def test_what_modules_return_and_what_is_overwritten() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Identity(), nn.Conv2d(4, 5, 1), nn.Flatten())
    recording = record(module, torch.rand(2, 3, 8, 8))
    assert [visit.module for visit in recording.visits] == ["0", "1", "2", "3", "4", ""]
    outputs = [visit.output for visit in recording.visits]
    assert [made.shape for made in outputs] == [(2, 4, 8, 8)] * 3 + [(2, 5, 8, 8), (2, 320), (2, 320)]
    hidden, output = outputs[0].value, outputs[3].value
    assert [made.value for made in outputs] == [hidden] * 3 + [output] * 3
    convolution, relu = (visit.end for visit in recording.visits[:2])
    assert [index for index, call in enumerate(recording.calls) if hidden in call.overwrites] == [relu - 1]
    assert recording.visits[2].end == relu > convolution
    (lone,) = lone_activations(recording, (Stage("a", ("0.weight", "0.bias")), Stage("b", ("3.weight", "3.bias"))))
    assert lone == dict.fromkeys(range(convolution, relu + 1), hidden)


def test_refused_images_are_the_users_mistake() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 9), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(BackboneError, match=r"refuses 3x8x8 images \(RuntimeError.*another data.image_size"):
        record(module, torch.rand(2, 3, 8, 8))
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_stages_that_do_not_partition_or_follow_the_network_are_named() -> None:
    module = Shared()
    recording = record(module, torch.rand(2, 3, 4, 4))
    a, b, both = (["a.weight", "a.bias"], ["b.weight", "b.bias"], ["both.weight", "both.bias"])
    with pytest.raises(BackboneError, match=r"no stage holds both.weight, both.bias;"):
        make_stages(module, recording, [a, b], ["a", "b"])
    with pytest.raises(BackboneError, match=r"more than one stage: b.bias \(a and b\)"):
        make_stages(module, recording, [[*a, "b.bias"], [*b, *both]], ["a", "b"])
    with pytest.raises(BackboneError, match=r"stage 'a' starts before stage 'rest' is through"):
        make_stages(module, recording, [[*b, *both], a], ["rest", "a"])
    with pytest.raises(BackboneError, match=r"stage 'b' starts before stage 'both' is through"):
        make_stages(module, recording, [a, both, b], ["a", "both", "b"])
    assert [stage.name for stage in make_stages(module, recording, [a, [*both, *b]])] == ["a", "both"]
    assert complete_groups(module, recording, [a, both, b]) == [a, [*b, *both]]


def test_tied_and_idle_parameters_are_named() -> None:
    module = Shared()
    module.b.weight = module.a.weight
    recording = record(module, torch.rand(2, 3, 4, 4))
    groups = [["a.weight", "a.bias"], ["b.weight", "b.bias", "both.weight", "both.bias"]]
    with pytest.raises(
        BackboneError, match=r"a.weight \(stage 'first'\) and b.weight \(stage 'second'\) are one tied tensor"
    ):
        make_stages(module, recording, groups, ["first", "second"])
    module = Shared()
    module.register_parameter("aux", nn.Parameter(torch.zeros(1)))
    recording = record(module, torch.rand(2, 3, 4, 4))
    with pytest.raises(BackboneError, match="aux: no part in the features"):
        make_stages(module, recording, [[name for name, _ in named_tensors(module)]])


@settings(max_examples=25, deadline=None)
@given(
    layers=st.lists(st.sampled_from(["conv", "norm", "relu", "pool", "block", "drop"]), min_size=1, max_size=9),
    nested=st.booleans(),
)
def test_any_chain_is_partitioned_in_order(layers: list[str], nested: bool) -> None:
    make = {
        "conv": lambda: nn.Conv2d(3, 3, 1),
        "norm": lambda: nn.BatchNorm2d(3),
        "relu": nn.ReLU,
        "pool": lambda: nn.MaxPool2d(3, 1, 1),
        "block": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()),
        "drop": nn.Dropout,
    }
    chain = nn.Sequential(nn.Conv2d(3, 3, 1), *(make[layer]() for layer in layers))
    module = nn.Sequential(nn.Sequential(chain) if nested else chain, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages, module_stage = cut_up(module, 8)
    assert sorted(t for stage in stages for t in stage.tensors) == sorted(name for name, _ in named_tensors(module))
    by_position = [stage for name, stage in module_stage.items() if not list(module.get_submodule(name).children())]
    assert by_position == sorted(by_position)
    assert len({stage.name for stage in stages}) == len(stages)
