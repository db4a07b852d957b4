"""A bundle for other libraries: each export is written, read back by the library that it is for, and held to the bundle's logits.

`full` is a bundle again, with all tensors. The others are folders of one model, `frostline.json` (labels, preprocessing, scores, where it
comes from), the tokenizer where it reads texts, and a README that says how to open it. Adapters are merged. What a target cannot
express is refused.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from frostline.bundle import Bundle, as_json, build_network, bundle_of, full_files, load_bundle
from frostline.commit import publish_folder
from frostline.cuts import run_on
from frostline.encoder import Encoder
from frostline.export_encoder import OfIds, named, save_for_transformers, usage
from frostline.extras import extra
from frostline.freeze import Network
from frostline.inputs import Texts
from frostline.vision import timm, torchvision

TOLERANCE = 1e-4
"""By how much logits may differ, relative to the largest where that is above 1."""
SAMPLES = 5

Logits = Callable[[Tensor], np.ndarray]
"""(N, 3, H, W) normalised images, or (N, 2, T) ids and types of tokens, to (N, C), by what was read back."""


class TargetError(ValueError):
    """A bundle that a target cannot express."""


class MismatchError(RuntimeError):
    """An export that does not give the bundle's logits."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    wrote: str
    opened: str
    """The Python that opens it."""


@dataclass(frozen=True)
class Target:
    """A library or format."""

    write: Callable[[Bundle, Network, Path], Logits]
    """Write the model into a folder, and answer what it gives when it is read from there."""
    opened: str
    """Python, with {path} for the folder, {name} for the backbone's name in its library and {classes} for their number."""
    library: str
    """As the Hugging Face Hub calls it."""


def export_bundle(folder: str | Path, target: str, out: Path | None = None) -> Exported:
    """Write a bundle for `target`, into a new folder `out` (beside the bundle when None).

    Raises TargetError, MissingExtraError and BundleError before anything is written, MismatchError and FileExistsError with
    nothing left of it.
    """
    folder = Path(folder)
    out = out or folder.with_name(f"{folder.name}-{target}")
    if out.exists():
        raise FileExistsError(f"{out} exists; move it away or give another --out")
    bundle = load_bundle(folder, device="cpu")
    if target == "full":
        return _whole(folder, bundle, out)
    chosen = TARGETS[target]
    expected, network = _live(bundle), _merged(bundle)
    fed = _samples(bundle)
    with tempfile.TemporaryDirectory(prefix="frostline-export-") as scratch:
        made = Path(scratch)
        logits = chosen.write(bundle, network, made)
        worst = _held(target, _logits(expected)(fed), logits(fed))
        _, _, name = bundle.spec.backbone.name.partition("/")
        parts = {"name": _timm_name(bundle) or name.partition("@")[0], "classes": len(bundle.classes)}
        opened = chosen.opened.format(path=out, **parts)
        if bundle.tokenizer and not (made / "tokenizer.json").exists():
            (made / "tokenizer.json").write_text(bundle.tokenizer.text, encoding="utf-8")
        (made / "README.md").write_text(_readme(bundle, target, out.name, chosen.opened.format(path=out.name, **parts)))
        (made / "frostline.json").write_bytes(as_json({**bundle.about, "exported": target}))
        publish_folder(out, {path.name: path.read_bytes() for path in made.iterdir()})
    wrote = f"logits of {SAMPLES} {bundle.inputs.noun}s within {worst:.1e} of the bundle's"
    if bundle.rounds:
        off = float(np.abs(_logits(bundle.network)(fed) - _logits(expected)(fed)).max())
        wrote += f", without the rounding to {bundle.spec.features.dtype} of its training, which makes {off:.1e}"
    return Exported(out, wrote, opened)


def _whole(folder: Path, bundle: Bundle, out: Path) -> Exported:
    fed = bundle.inputs.noise(SAMPLES, bundle.size)
    files = full_files(folder)
    whole = bundle_of(files, device="cpu")
    if not np.array_equal(_logits(bundle.network)(fed), _logits(whole.network)(fed)):
        raise MismatchError(f"{folder}: with all its tensors it gives other logits")
    publish_folder(out, files)
    return Exported(out, "all tensors, the same logits to the bit", f'frostline.load_bundle("{out}")')


def _live(bundle: Bundle) -> Network:
    """The bundle's network in float32, adapters beside the weights, nothing rounded."""
    network, _ = build_network(
        bundle.spec, bundle.backbone, bundle.plan, len(bundle.classes), torch.device("cpu"), rounding=None
    )
    network.load_state_dict(bundle.network.state_dict())
    return network


def _merged(bundle: Bundle) -> Network:
    """The same with its adapters merged into the weights, under the backbone's own names."""
    live = _live(bundle)
    if bundle.spec.config.freeze.strategy in ("lora", "dora"):
        _merge(live.backbone)
    freeze = bundle.spec.config.freeze.model_copy(update={"strategy": "full"})  # which adds no adapters
    config = bundle.spec.config.model_copy(update={"freeze": freeze})
    spec = bundle.spec.model_copy(update={"config": config})
    network, _ = build_network(
        spec, bundle.backbone, bundle.plan, len(bundle.classes), torch.device("cpu"), rounding=None
    )
    network.load_state_dict(live.state_dict())
    return network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


def _merge(module: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            module.set_submodule(name, layer.get_base_layer())


def _samples(bundle: Bundle) -> Tensor:
    """Normalised noise, (SAMPLES, 3, H, W), or tokens, (SAMPLES, 2, T), of texts or of pairs; the same each time."""
    if isinstance(bundle.inputs, Texts):
        tokens = bundle.inputs.noise(SAMPLES, bundle.size)
        if bundle.pair and bundle.inputs.types > 1:
            tokens[:, 1, bundle.size // 2 :] = 1
        return tokens
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 3, bundle.size, bundle.size, generator=generator)


def _logits(network: nn.Module) -> Logits:
    def give(fed: Tensor) -> np.ndarray:
        with torch.no_grad():
            return network(fed).numpy()

    return give


def _held(target: str, expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference. Raises MismatchError."""
    worst = float(np.abs(expected - found).max()) if found.shape == expected.shape else np.inf
    if not worst <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise MismatchError(
            f"{target}: what was written gives logits that differ from the bundle's by {worst:.1e}, more than {TOLERANCE:g}; "
            "nothing was kept. Please report it, with the bundle.json"
        )
    return worst


def _write_safetensors(bundle: Bundle, network: Network, folder: Path) -> Logits:
    file = folder / "model.safetensors"
    safetensors.save_file(_tensors(network.state_dict()), file)
    again = _merged(bundle)
    again.load_state_dict(safetensors.load_file(file))
    return _logits(again)


def _write_timm(bundle: Bundle, network: Network, folder: Path) -> Logits:
    name = _timm_name(bundle)
    if name is None:
        raise TargetError(f"{bundle.spec.backbone.name} is not a model of timm; there are {_others(bundle, 'timm')}")
    _check_linear(bundle, "timm")
    size: dict[str, Any] = {"img_size": bundle.size} if timm.get_pretrained_cfg_value(name, "fixed_input_size") else {}
    model: Any = timm.create_model(name, num_classes=len(bundle.classes), **size)
    _put(model, network, "timm")
    shown = bundle.about["preprocessing"]
    crop = {"crop_pct": 1.0, "crop_mode": "center" if shown["fit"] == "crop" else "squash"}
    given = {"input_size": [3, bundle.size, bundle.size], "mean": shown["mean"], "std": shown["std"]}
    config = {"label_names": list(bundle.classes), "pretrained_cfg": {**given, **crop, "interpolation": "bicubic"}}
    timm.models.save_for_hf(model, str(folder), model_config=config, model_args=size or None, safe_serialization=True)
    return _logits(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())


def _write_torchvision(bundle: Bundle, network: Network, folder: Path) -> Logits:
    source, _, name = bundle.spec.backbone.name.partition("/")
    if source != "torchvision":
        raise TargetError(
            f"{bundle.spec.backbone.name} is not a model of torchvision; there are {_others(bundle, 'torchvision')}"
        )
    _check_linear(bundle, "torchvision")

    def build() -> nn.Module:
        return torchvision.models.get_model(name.partition("@")[0], weights=None, num_classes=len(bundle.classes))

    model = build()
    _put(model, network, "torchvision")
    safetensors.save_file(_tensors(model.state_dict()), folder / "model.safetensors")
    again = build()
    again.load_state_dict(safetensors.load_file(folder / "model.safetensors"))
    return _logits(again.eval())


def _write_transformers(bundle: Bundle, network: Network, folder: Path) -> Logits:
    if not isinstance(network.backbone, Encoder):
        name = bundle.spec.backbone.name
        raise TargetError(f"{name} is not a model of transformers; there are {_others(bundle, 'transformers')}")
    _check_end(bundle, "transformers")
    return save_for_transformers(bundle, network.backbone, network.head, folder)


def _traced(bundle: Bundle, network: Network) -> tuple[nn.Module, dict[str, Tensor], tuple[dict[int, Any], ...]]:
    """What a tracer is given: a module, an example of its arguments, and which of their dimensions are free."""
    run_on(network.backbone)
    example = named(network.backbone, _samples(bundle)[:2])
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1 << 16)}
    if isinstance(bundle.inputs, Texts):
        free[1] = torch.export.Dim("tokens", min=2, max=bundle.inputs.longest)
        return OfIds(network), example, (free,) * len(example)
    return network, example, (free,)


def _write_torch_export(bundle: Bundle, network: Network, folder: Path) -> Logits:
    module, example, free = _traced(bundle, network)
    with torch.no_grad(), _hushed():
        program = torch.export.export(module, (*example.values(),), dynamic_shapes=free)
        torch.export.save(program, folder / "model.pt2")
        again = torch.export.load(folder / "model.pt2").module()

    def give(fed: Tensor) -> np.ndarray:
        with torch.no_grad():
            return again(*named(network.backbone, fed).values()).numpy()

    return give


def _write_onnx(bundle: Bundle, network: Network, folder: Path) -> Logits:
    for package in ("onnx", "onnxscript"):
        extra("onnx", package)
    runtime = extra("onnx", "onnxruntime")
    module, example, free = _traced(bundle, network)
    with torch.no_grad(), _hushed():
        torch.onnx.export(
            module,
            (*example.values(),),
            folder / "model.onnx",
            dynamo=True,
            verbose=False,
            input_names=[*example],
            output_names=["logits"],
            dynamic_shapes=free,
            external_data=sum(tensor.nbytes for tensor in network.state_dict().values()) > 1 << 30,
        )
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def give(fed: Tensor) -> np.ndarray:
        given = {name: each.numpy() for name, each in named(network.backbone, fed).items()}
        return session.run(["logits"], given)[0]

    return give


TARGETS: dict[str, Target] = {
    "safetensors": Target(
        _write_safetensors, 'safetensors.torch.load_file("{path}/model.safetensors")', library="safetensors"
    ),
    "timm": Target(_write_timm, 'timm.create_model("local-dir:{path}", pretrained=True)', library="timm"),
    "torchvision": Target(
        _write_torchvision,
        'model = torchvision.models.get_model("{name}", num_classes={classes}); '
        'model.load_state_dict(safetensors.torch.load_file("{path}/model.safetensors"))',
        library="torchvision",
    ),
    "transformers": Target(
        _write_transformers, 'transformers.AutoModel.from_pretrained("{path}")', library="transformers"
    ),
    "torch-export": Target(_write_torch_export, 'torch.export.load("{path}/model.pt2").module()', library="pytorch"),
    "onnx": Target(_write_onnx, 'onnxruntime.InferenceSession("{path}/model.onnx")', library="onnx"),
}


def _timm_name(bundle: Bundle) -> str | None:
    source, _, name = bundle.spec.backbone.name.partition("/")
    return "tf_efficientnet_lite0" if source == "efficientnet-lite0" else name if source == "timm" else None


def _check_end(bundle: Bundle, target: str) -> None:
    """Raises TargetError unless the head stands at the backbone's end."""
    stages = len(bundle.backbone.stages)
    if bundle.plan.end < stages:
        raise TargetError(
            f"its head stands after stage {bundle.plan.end} of {stages}, and a model of {target} has it at the end; "
            "safetensors, torch-export and onnx take it as it is"
        )


def _check_linear(bundle: Bundle, target: str) -> None:
    """Raises TargetError unless the head is one linear layer at the backbone's end."""
    _check_end(bundle, target)
    if hidden := bundle.spec.config.head.hidden:
        raise TargetError(
            f"its head is an MLP of {hidden} units, and a model of {target} has one linear layer there; safetensors, torch-export "
            "and onnx take it as it is"
        )


def _put(model: nn.Module, network: Network, target: str) -> None:
    """Load a network into a library's own model with a classifier. Raises TargetError where that has no place for it."""
    state = network.backbone.state_dict()
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state]
    owners = {name.rpartition(".")[0] for name in missing}
    leaves = sorted(name.rpartition(".")[2] for name in missing)
    if len(owners) != 1 or leaves != ["bias", "weight"] or not state.keys() <= wanted.keys():
        raise TargetError(f"{target}'s model has no single linear classifier with a bias, but {', '.join(missing[:5])}")
    (owner,) = owners
    out = network.head[-1]
    assert isinstance(out, nn.Linear), "checked before"
    weight = out.weight.detach().reshape(wanted[f"{owner}.weight"].shape)
    model.load_state_dict({**state, f"{owner}.weight": weight, f"{owner}.bias": out.bias.detach()})
    model.eval()


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As a file takes them: each with memory of its own."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}


def _others(bundle: Bundle, target: str) -> str:
    """What it can be written for instead."""
    own = {
        "timm": _timm_name(bundle) is not None,
        "torchvision": bundle.spec.backbone.name.startswith("torchvision/"),
        "transformers": bundle.tokenizer is not None,
    }
    return ", ".join(name for name in TARGETS if name != target and own.get(name, True))


def _readme(bundle: Bundle, target: str, folder: str, opened: str) -> str:
    regression = bundle.task == "regression"
    task = f"{bundle.inputs.noun}-{'regression' if regression else 'classification'}"
    given = "numbers, in the unit of the labels," if regression else "logits,"
    scores = {name: value for name, value in bundle.about["scores"].items() if name.startswith("test_")}
    told = ", ".join(f"{name.removeprefix('test_')} {value:.4f}" for name, value in scores.items())
    return "\n".join(
        [
            "---",
            f"library_name: {TARGETS[target].library}",
            *([f"pipeline_tag: {task}"] if not regression else []),
            f"tags: {json.dumps([task, 'transfer-learning', 'frostline'])}",
            f"base_model: {json.dumps(bundle.spec.backbone.name)}",
            "---",
            f"# {bundle.spec.trial_id}",
            "",
            "Exported from a bundle of Frostline. Open it with",
            "",
            f"    {opened}",
            "",
            *_takes(bundle, target, folder, opened),
            f"Output: (N, {len(bundle.classes)}) {given} in the order of `labels` in `frostline.json`, which also has the configuration, the",
            "hashes of data and weights, and the scores.",
            "",
            f"On test, one seed: {told}.",
            "",
        ]
    )


def _takes(bundle: Bundle, target: str, folder: str, opened: str) -> list[str]:
    shown = bundle.about["preprocessing"]
    if bundle.tokenizer is None:
        return [
            f"Input: RGB images of {shown['image_size']} x {shown['image_size']} pixels, (N, 3, H, W) float32, values from 0 to 1 less",
            f"{shown['mean']}, divided by {shown['std']}.",
        ]
    code = usage(bundle, target, folder, opened)
    return ["From texts to logits:", "", *(f"    {line}".rstrip() for line in code), ""]


def _hushed() -> Any:
    """Exporters warn of their own deprecations."""
    return warnings.catch_warnings(action="ignore")
