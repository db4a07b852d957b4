"""Emitting and resuming at every cut of real architectures, to the bit. Random weights and small images."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frostline.backbone import Backbone, BackboneError, _load, load_backbone, stage_table
from frostline.closedform import pooled
from frostline.cuts import Cut, _known, cuts_of, emit, find_cuts, leave_at, pooled_cut, resume, round_at
from frostline.spec import BackboneSpec
from frostline.stages import Stage, make_stages, module_stages, named_tensors, record


@pytest.fixture(scope="module", autouse=True)
def _give_back_memory() -> Iterator[None]:
    yield
    _known.cache_clear()
    _load.cache_clear()


@pytest.fixture(autouse=True)
def _as_in_a_trial() -> None:
    torch.backends.mha.set_fastpath_enabled(False)


# Name -> side in pixels, stages (all of which can be cut), where the first cut is, and how large.
FAMILIES = {
    "python:frostline.testing:toy_backbone": (16, 3, "stem", (8, 8, 8)),
    "efficientnet-lite0": (64, 8, "bn1", (32, 32, 32)),
    "timm/resnet10t": (64, 5, "maxpool", (64, 16, 16)),
    "timm/vit_tiny_patch16_224": (32, 13, "norm_pre", (5, 192)),
    "timm/convnext_atto": (64, 5, "stages.0.downsample", (40, 16, 16)),
    "timm/mobilenetv3_small_050": (64, 8, "bn1", (16, 32, 32)),
    "torchvision/resnet18": (64, 5, "maxpool", (64, 16, 16)),
    "torchvision/mobilenet_v3_small": (64, 14, "features.0", (16, 32, 32)),
    "torchvision/densenet121": (32, 8, "features.pool0", (64, 8, 8)),
}


def load(name: str, side: int) -> Backbone:
    weights = "pretrained" if name == "efficientnet-lite0" else "random"
    return load_backbone(BackboneSpec(name=name, weights=weights), image_size=side)


def noise(count: int, side: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def resumed(module: nn.Module, cut: Cut) -> nn.Module:
    module = copy.deepcopy(module)
    resume(module, cut)
    return module


def trained(module: nn.Module, stages: tuple[Stage, ...], module_stage: Any, cut: int, inputs: Tensor) -> Tensor:
    """One training step's output, with the stages below the cut frozen; leaves its gradients and statistics in `module`."""
    held = {tensor for stage in stages[:cut] for tensor in stage.tensors}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in held)
    module.train()
    for name, stage in module_stage.items():
        module.get_submodule(name).training = stage >= cut
    torch.manual_seed(5)
    features = module(inputs)
    features.square().mean().backward()
    return features.detach()


def check_training(module: nn.Module, stages: tuple[Stage, ...], module_stage: Any, cut: Cut, images: Tensor) -> None:
    """A step from the emitted activation is the whole network's: output, gradients, statistics; the rest has not moved."""
    (activation,) = emit(module, [cut], images).values()
    whole, rest = copy.deepcopy(module), resumed(module, cut)
    given = activation.clone()
    outputs = [
        trained(whole, stages, module_stage, cut.index, images),
        trained(rest, stages, module_stage, cut.index, activation),
    ]
    assert torch.equal(*outputs)
    assert torch.equal(activation, given)
    assert list(whole.state_dict()) == list(rest.state_dict())
    for (name, tensor), (other, twin) in zip(named_tensors(whole), named_tensors(rest), strict=True):
        assert name == other
        assert torch.equal(tensor, twin)
        assert (tensor.grad is None) == (twin.grad is None) == (not tensor.requires_grad)
        assert tensor.grad is None or torch.equal(tensor.grad, twin.grad)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_a_network_left_at_a_cut_gives_means_there_and_goes_no_further(index: int) -> None:
    backbone = load("python:frostline.testing:toy_backbone", 16)
    cut, images, whole = cuts_of(backbone, 16)[index], noise(4, 16), copy.deepcopy(backbone.module).eval()
    ran: list[str] = []
    for name in ("stem", "block1", "block2"):
        whole.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    leave_at(whole, cut, pooled)
    features = whole(images)
    assert ran == ["stem", "block1", "block2"][:index]
    assert torch.equal(features, pooled(emit(backbone.module, [cut], images)[index]))
    features.sum().backward()
    assert {name.partition(".")[0] for name, tensor in whole.named_parameters() if tensor.grad is not None} == set(ran)
    if index > 1:
        rest, begin = copy.deepcopy(backbone.module).eval(), cuts_of(backbone, 16)[1]
        leave_at(rest, cut, pooled)
        resume(rest, begin)
        given = emit(backbone.module, [begin], images)[1]
        assert torch.equal(rest(given), features)
        assert torch.equal(rest(given), features), "time after time"
    resumed = copy.deepcopy(backbone.module)
    resume(resumed, pooled_cut(cut))
    assert resumed(features) is features
    if index < 3:
        half = copy.deepcopy(backbone.module).eval()
        leave_at(half, cut, pooled, torch.float16)
        assert torch.equal(half(images), features.half().float())


# --- every cut of real networks


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_emits_every_cut_and_the_network_resumes_from_each(name: str) -> None:
    side, stages, module, shape = FAMILIES[name]
    backbone = load(name, side)
    before = backbone.weights_hash, hooks(backbone.module)
    cuts = cuts_of(backbone, side)
    assert [*cuts] == [*range(1, stages + 1)]
    assert (cuts[1].module, cuts[1].shape) == (module, shape)
    assert (cuts[stages].module, cuts[stages].shape) == ("", (backbone.feature_dim,))

    images = noise(5, side)
    seen: dict[str, Tensor] = {}
    passes: list[nn.Module] = []
    watched = copy.deepcopy(backbone.module)
    for cut in cuts.values():

        def see(_: nn.Module, __: Any, output: Tensor, name: str = cut.module) -> None:
            seen[name] = output.clone()

        watched.get_submodule(cut.module).register_forward_hook(see)
    with torch.no_grad():
        features = watched(images)
        counting = backbone.module.register_forward_pre_hook(lambda module, _: passes.append(module))
        activations = emit(backbone.module, reversed(cuts.values()), images)
        counting.remove()
        assert passes == [backbone.module]
        assert [*activations] == [*cuts]
        for index, cut in cuts.items():
            assert activations[index].shape == (5, *cut.shape)
            assert torch.equal(activations[index], seen[cut.module])
            assert activations[index].stride() == seen[cut.module].stride()
            with resume(backbone.module, cut):
                assert torch.equal(backbone.module(activations[index]), features)
        assert torch.equal(backbone.module(images), features)
    assert not any("forward" in vars(child) for child in backbone.module.modules())
    assert (backbone.weights_hash, hooks(backbone.module)) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_no_work_is_done_beyond_the_cut_or_before_it(name: str) -> None:
    side = FAMILIES[name][0]
    backbone = load(name, side)
    flops = [cost.flops for cost in stage_table(backbone, side)]
    images = noise(2, side)
    module = copy.deepcopy(backbone.module)
    ran: list[int] = []
    for name, child in module.named_modules():
        if [*child.parameters()] and not [*child.children()]:
            stage = backbone.module_stage[name]
            child.register_forward_pre_hook(lambda *_, stage=stage: ran.append(stage))
    cuts = cuts_of(backbone, side)
    for index in {1, len(cuts) // 2, len(cuts) - 1, len(cuts)}:
        ran.clear()
        (activation,) = emit(module, [cuts[index]], images).values()
        assert max(ran) == index - 1
        with resume(module, cuts[index]):
            recording = record(module, activation)
        assert sum(call.flops for call in recording.calls) == 2 * sum(flops[index:])


@pytest.mark.parametrize("name", FAMILIES)
def test_training_from_activations_is_training_the_whole_network(name: str) -> None:
    side = FAMILIES[name][0]
    backbone = load(name, side)
    cuts = cuts_of(backbone, side)
    for index in {1, len(cuts) // 2, len(cuts) - 1}:
        check_training(backbone.module, backbone.stages, backbone.module_stage, cuts[index], noise(6, side))


@pytest.mark.parametrize("name", ["efficientnet-lite0", "timm/vit_tiny_patch16_224", "torchvision/resnet18"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounding_live_is_rounding_what_is_stored(name: str, dtype: torch.dtype) -> None:
    side = FAMILIES[name][0]
    backbone = load(name, side)
    images = noise(3, side)
    cuts = cuts_of(backbone, side)
    for cut in (cuts[1], cuts[len(cuts) // 2], cuts[len(cuts)]):
        (activation,) = emit(backbone.module, [cut], images).values()
        stored = activation.to(dtype)
        live = copy.deepcopy(backbone.module)
        round_at(live, cut, dtype)
        with torch.no_grad():
            with resume(backbone.module, cut):
                expected = backbone.module(stored.float())
            assert torch.equal(live(images), expected)
            assert torch.equal(copy.deepcopy(live)(images), expected)
            assert torch.equal(backbone.module(images), expected) == (dtype == torch.float32)
        (rounded,) = emit(live, [cut], images).values()
        assert torch.equal(rounded, activation) == (dtype == torch.float32)


@pytest.mark.parametrize("name", ["timm/mobilenetv3_small_050", "timm/vit_tiny_patch16_224"])
def test_channels_last_and_bfloat16_are_kept(name: str) -> None:
    side = FAMILIES[name][0]
    backbone = load(name, side)
    cuts = cuts_of(backbone, side)
    module = copy.deepcopy(backbone.module).to(memory_format=torch.channels_last)
    images = noise(3, side).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = module(images)
        activations = emit(module, cuts.values(), images)
        if len(cuts[1].shape) == 3:
            assert activations[1].is_contiguous(memory_format=torch.channels_last)
        for index, cut in cuts.items():
            with resume(module, cut):
                assert torch.equal(module(activations[index]), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = module(images)
            activations = emit(module, cuts.values(), images)
            for index, cut in cuts.items():
                with resume(module, cut):
                    assert torch.equal(module(activations[index]), expected)


def test_a_cut_is_plain_data_and_cuts_are_found_once() -> None:
    backbone = load("timm/resnet10t", 64)
    cuts = cuts_of(backbone, 64)
    assert all(again is cuts[index] for index, again in cuts_of(backbone, 64).items())
    assert pickle.loads(pickle.dumps(cuts)) == cuts
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(True)
    again = find_cuts(backbone.module, backbone.stages, noise(4, 64))
    assert again == cuts
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_resumed_network_is_copied_pickled_and_undone() -> None:
    backbone = load("timm/resnet10t", 64)
    cut = cuts_of(backbone, 64)[2]
    images = noise(2, 64)
    (activation,) = emit(backbone.module, [cut], images).values()
    module = copy.deepcopy(backbone.module)
    with torch.no_grad():
        features = module(images)
        undo = resume(module, cut)
        assert torch.equal(copy.deepcopy(module)(activation), features)
        assert torch.equal(pickle.loads(pickle.dumps(module))(activation), features)
        module.load_state_dict(backbone.module.state_dict())
        with pytest.raises(AssertionError, match="has a forward of its own already"):
            resume(module, cut)
        undo.close()
        assert torch.equal(module(images), features)
    assert not any("forward" in vars(child) for child in module.modules())


def test_images_of_another_size_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BackboneError, match="refuses 3x8x8 images"):
        find_cuts(module, (), noise(3, 8))


# --- networks with something special


def cut_up(module: nn.Module, *groups: str) -> tuple[tuple[Stage, ...], dict[str, int], dict[int, Cut]]:
    """Stages by the first letters of their tensors' names; the cuts."""
    module.eval()
    recording = record(module, noise(3, 8))
    names = [[name for name, _ in named_tensors(module) if name.startswith(group)] for group in groups]
    stages = make_stages(module, recording, names, groups)
    return stages, module_stages(module, recording, stages), find_cuts(module, stages, noise(3, 8))


def check_custom(module: nn.Module, groups: tuple[str, ...], expected: dict[int, str]) -> dict[int, Cut]:
    torch.manual_seed(0)
    stages, module_stage, cuts = cut_up(module, *groups)
    assert {index: cut.module for index, cut in cuts.items()} == {**expected, len(groups): ""}
    images = noise(4, 8)
    with torch.no_grad():
        features = module(images)
        activations = emit(module, cuts.values(), images)
        for index, cut in cuts.items():
            assert torch.equal(resumed(module, cut)(activations[index]), features)
    for index in expected:
        check_training(module, stages, module_stage, cuts[index], images)
    assert hooks(module) == 0
    return cuts


class Block(nn.Module):
    """Returns a tuple, as Hugging Face's layers do, and its input's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, scale: float = 1.0) -> tuple[Tensor, int]:
        return tokens + scale * self.mlp(self.norm(tokens)), tokens.shape[2]


class Tokens(nn.Module):
    """Functional code between modules: class token, positions, blocks that return tuples, a token taken at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a_patch = nn.Conv2d(3, 8, 4, 4)
        self.a_class, self.a_position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.a_norm = nn.LayerNorm(8)
        self.b, self.c, self.d = Block(8), Block(8), nn.Linear(8, 6)

    def forward_features(self, images: Tensor) -> Tensor:
        tokens = self.a_patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.a_class.expand(len(tokens), -1, -1), tokens], 1)
        tokens = self.a_norm(tokens + self.a_position)
        for block in (self.b, self.c):
            tokens, width = block(tokens, scale=0.5)
            tokens = tokens.view(-1, 5, width)
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        return self.d(self.forward_features(images)[:, 0])


def test_code_between_modules_and_tuples() -> None:
    cuts = check_custom(Tokens(), ("a", "b", "c", "d"), {1: "a_norm", 2: "b", 3: "c"})
    assert cuts[2].output == (cuts[2].output[0], 8)
    assert [cut.shape for cut in cuts.values()] == [(5, 8), (5, 8), (5, 8), (6,)]
    assert [name for name, _ in cuts[3].skipped] == ["a_patch", "a_norm", "b"]


class InPlace(nn.Module):
    """Writes into every activation right after the module that returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.b(self.a(images).relu_()).mul_(2)
        return self.c(hidden.mean((2, 3)))


def test_an_activation_that_is_overwritten_later() -> None:
    cuts = check_custom(InPlace(), ("a", "b", "c"), {1: "a", 2: "b"})
    assert [cut.overwritten for cut in cuts.values()] == [True, True, False]


def test_a_boundary_with_two_streams_is_no_cut() -> None:
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, images: Tensor) -> Tensor:
            stem = self.a(images)
            return self.d(self.c(stem) + self.b(stem)).mean((2, 3))

    check_custom(Streams(), ("a", "c", "b", "d"), {1: "a"})  # the sum before d is no module's
    Streams.forward = lambda self, images: self.d(self.c(images) + self.b(self.a(images))).mean((2, 3))
    check_custom(Streams(), ("c", "a", "b", "d"), {})


def test_modules_that_run_several_times() -> None:
    class Again(nn.Module):
        """One activation function for all; the first block twice; the second runs inside a container, too."""

        def __init__(self) -> None:
            super().__init__()
            self.act, self.end = nn.ReLU(inplace=True), nn.Identity()
            self.a = nn.Conv2d(3, 3, 1)
            self.b = nn.Conv2d(3, 3, 1)
            self.b_inner = nn.Sequential(self.b, nn.Tanh())
            self.c = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.end(self.act(self.a(self.act(self.a(images)))))
            return self.act(self.c(self.b_inner(self.b(hidden)).mean((2, 3))))

    cuts = check_custom(Again(), ("a", "b", "c"), {1: "end", 2: "b_inner"})
    assert [name for name, _ in cuts[1].skipped] == ["a"]  # act and b run after the cut as well


def test_modules_that_see_nothing_of_the_images_still_run() -> None:
    class Biased(nn.Module):
        """A table of positions is computed by a module in every pass, before the first cut, and used after it."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.a_table = nn.Linear(8, 8)

        def forward(self, images: Tensor) -> Tensor:
            table = self.a_table(torch.eye(8))
            hidden = self.a(images.mean(1))
            return self.c((self.b(hidden) + table).mean(1))

    cuts = check_custom(Biased(), ("a", "b", "c"), {1: "a", 2: "b"})
    assert [[*dict(cut.skipped)] for cut in cuts.values()] == [[], ["a"], []]


def test_randomness_before_the_activation_is_no_cut() -> None:
    class Noisy(nn.Module):
        """Dropout as a function of the whole network's mode: a frozen prefix in a network that trains is random."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.pool = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2), nn.MaxPool2d(2)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.pool(nn.functional.dropout(self.a(images), 0.5, self.training))
            return self.c(self.b(hidden).mean((2, 3)))

    cuts = check_custom(Noisy(), ("a", "b", "c"), {1: "a"})  # not pool, although what it returns is smaller
    assert cuts[1].shape == (4, 8, 8)


def test_an_alias_beside_what_the_module_returns_is_noticed() -> None:
    class Alias(nn.Module):
        """`end` returns its input, which is then used under its own name, too."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.end, self.b = nn.Conv2d(3, 4, 1), nn.Identity(), nn.Conv2d(4, 4, 1)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.a(images)
            return (self.end(hidden) + self.b(hidden)).mean((2, 3))

    check_custom(Alias(), ("a", "b"), {1: "a"})


def test_emitting_needs_no_cut_and_survives_a_failing_network() -> None:
    module = InPlace()
    _, _, cuts = cut_up(module, "a", "b", "c")
    assert emit(module, [], noise(2, 8)) == {}
    with pytest.raises(RuntimeError, match="channels"):
        emit(module, cuts.values(), torch.rand(2, 5, 8, 8))
    assert hooks(module) == 0


@settings(max_examples=25)
@given(
    layers=st.lists(st.sampled_from(["conv", "norm", "relu", "pool", "block", "drop"]), min_size=1, max_size=8),
    nested=st.booleans(),
)
def test_any_chain_can_be_cut_anywhere(layers: list[str], nested: bool) -> None:
    make = {
        "conv": lambda: nn.Conv2d(3, 3, 1),
        "norm": lambda: nn.BatchNorm2d(3),
        "relu": nn.ReLU,
        "pool": lambda: nn.MaxPool2d(3, 1, 1),
        "block": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
        "drop": nn.Dropout,
    }
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 3, 1), *(make[layer]() for layer in layers))
    module = nn.Sequential(nn.Sequential(chain) if nested else chain, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    recording = record(module, noise(3, 8))
    prefix = "0.0." if nested else "0."
    groups: dict[str, list[str]] = {}
    for name, _ in named_tensors(module):
        groups.setdefault(prefix + name.removeprefix(prefix).partition(".")[0], []).append(name)
    stages = make_stages(module, recording, [*groups.values()], [*groups])
    cuts = find_cuts(module, stages, noise(3, 8))
    assert [*cuts] == [*range(1, len(stages) + 1)]
    module.eval()
    module_stage = module_stages(module, recording, stages)
    for cut in cuts.values():
        if cut.index < len(stages):
            check_training(module, stages, module_stage, cut, noise(4, 8))


# --- the breadth of timm

SEVERAL_CLASSIFIERS = {
    "crossvit", "efficientformer", "efficientformer_v2", "efficientvim", "levit", "repvit", "swiftformer", "volo"
}  # fmt: skip
SEVERAL_STREAMS = {"hrnet", "nasnet", "pnasnet", "tnt"}
NO_MODULE_RETURNS_IT = {
    # at one boundary, where code between modules adds positions or a class token
    "convit": 11, "visformer": 1, "xcit": 13
}  # fmt: skip
LARGE = {
    "beit", "cait", "convmixer", "deepseek_vit", "focalnet", "gemma4_vit", "hieradet_sam2", "inception_resnet_v2",
    "inception_v4", "mlp_mixer", "mobilenetv5", "naflexvit", "qwen3_vit", "senet", "tresnet", "vgg",
    "vision_transformer_hybrid", "vision_transformer_sam", "xception", "xception_aligned"
}  # fmt: skip
SMALL = ("test_", "tiny", "nano", "atto", "pico", "femto", "_xxs", "_s0", "18", "small", "_s", "_0")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_one_architecture_of_every_timm_family_of_moderate_size() -> None:
    missing: dict[str, list[int]] = {}
    families = [family for family in timm.list_modules() if timm.list_models(module=family)]
    families = [family for family in families if family not in LARGE | SEVERAL_CLASSIFIERS]
    for family in families:
        names = timm.list_models(module=family)
        name = min(names, key=lambda name: (not any(part in name for part in SMALL), len(name), name))
        native = timm.get_pretrained_cfg(name).input_size[-1]
        for side in sorted({96, 112, native}):
            try:
                backbone = load(f"timm/{name}", side)
            except BackboneError:
                continue
            missing[family] = sorted({*range(1, len(backbone.stages) + 1)} - cuts_of(backbone, side).keys())
            break
        _known.cache_clear()
        _load.cache_clear()
    assert missing.keys() == set(families)
    assert {family for family, indices in missing.items() if len(indices) > 1} == SEVERAL_STREAMS
    assert {family: indices[0] for family, indices in missing.items() if len(indices) == 1} == NO_MODULE_RETURNS_IT
