"""A training that was interrupted goes on to the bit (P8): its state at the end of an epoch, as one safetensors file.

Tensors are kept by name, those of the optimizer by the name of their parameter; what the plan holds fixed is not in it, as the
backbone has that. Python objects are not in it either: reading a checkpoint runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from frostline.collectives import full, lay
from frostline.freeze import whole
from frostline.head import SeededDropout
from frostline.outcome import EpochRecord
from frostline.training import Training
from frostline.weights import hash_tensors

FORMAT = 1


class CheckpointError(ValueError):
    """What is no checkpoint, or another training's."""


class DamagedCheckpointError(CheckpointError):
    """What is no checkpoint, or none any more."""


@dataclass(frozen=True)
class Keep:
    """Where a trial keeps its checkpoint, to go on from should it be interrupted."""

    load: Callable[[], bytes | None]
    """The latest that was saved, if any."""
    save: Callable[[bytes], None]
    every_s: float = 0.0
    """The state is saved at the end of an epoch where the last time is so long ago."""

    def is_due(self, since_s: float) -> bool:
        return since_s >= self.every_s


def save_training(training: Training, of: str) -> bytes:
    """The state of a training between two epochs; `of` says which training it is. Of a network that is spread over workers all
    must ask, and all get the same."""
    assert training.optimizer is not None, "no phase has begun"
    network, fixed = training.network, whole(training.phases).fixed
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    tensors = {f"network/{name}": tensor for name, tensor in network.state_dict().items() if name not in fixed}
    for parameter, state in training.optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):  # SGD without momentum keeps None
                tensors[f"optimizer/{names[parameter]}/{key}"] = value
    for kind, scored in (("average", training.average), ("blend", training.blend)):
        if scored is not None:
            tensors |= {f"{kind}/{names[live]}": held for live, held in zip(scored.live, scored.held, strict=True)}
    for name, module in _dropouts(training):
        if module.generator is not None:
            tensors[f"dropout/{name}"] = module.generator.get_state()
    about = {
        "format": FORMAT,
        "of": of,
        "records": [asdict(record) for record in training.records],
        "order": training.order.bit_generator.state,
        "weights": {
            names[group["params"][0]]: group["weight"] for group in training.optimizer.param_groups if "weight" in group
        },
    }
    tensors["about"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    tensors = {name: full(tensor.detach()).cpu().clone().contiguous() for name, tensor in tensors.items()}
    tensors["sha256"] = torch.frombuffer(bytearray(hash_tensors(tensors.items()).encode()), dtype=torch.uint8)
    return safetensors.torch.save(tensors)


def opened(checkpoint: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint and what it says of the training, every byte of them verified. Raises CheckpointError."""
    try:
        tensors = safetensors.torch.load(checkpoint)
        whole = tensors.pop("sha256").numpy().tobytes() == hash_tensors(tensors.items()).encode()
        about = json.loads(tensors.pop("about").numpy().tobytes())
        written = about["format"]
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedCheckpointError(f"this is no checkpoint, or a damaged one: {error}") from error
    if not whole:
        raise DamagedCheckpointError("the checkpoint is damaged: its checksum does not fit")
    if written != FORMAT:
        raise CheckpointError(f"checkpoint format {written!r}, and this version reads format {FORMAT}")
    return tensors, about


def load_training(training: Training, checkpoint: bytes, of: str) -> None:
    """Let a training that has not begun go on where that of the checkpoint was. Raises CheckpointError."""
    tensors, about = opened(checkpoint)
    if about["of"] != of:
        raise CheckpointError("the checkpoint is of another configuration, of other data or weights, or of other code")
    training.records[:] = [EpochRecord(**record) for record in about["records"]]
    training.order.bit_generator.state = about["order"]
    training.go_on = lambda: _lay_over(training, tensors, about["weights"])


@torch.no_grad()
def _lay_over(training: Training, tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    """Put the tensors where they were, in a training whose phase has begun."""
    assert training.optimizer is not None
    network, device = training.network, training.train.labels.device
    own, parameters = network.state_dict(), dict(network.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "network":
            lay(own[rest], tensor)
        elif kind == "optimizer":
            owner, _, key = rest.rpartition("/")
            training.optimizer.state[parameters[owner]][key] = _like(parameters[owner], tensor)
    for kind, scored in (("average", training.average), ("blend", training.blend)):
        for live, held in zip(scored.live, scored.held, strict=True) if scored is not None else ():
            lay(held, tensors[f"{kind}/{names[live]}"])
    for group in training.optimizer.param_groups:
        if (name := names[group["params"][0]]) in weights:
            group["weight"] = weights[name]
    if training.relative is not None:
        training.relative.settled = bool(weights)
    for name, module in _dropouts(training):
        if (state := tensors.get(f"dropout/{name}")) is not None:
            module.generator = torch.Generator(device)
            module.generator.set_state(state)


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A moment in the memory layout of its parameter; a count of steps as it is."""
    if tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    lay(moment := torch.empty_like(parameter), tensor)
    return moment


def _dropouts(training: Training) -> list[tuple[str, SeededDropout]]:
    modules = training.network.head.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, SeededDropout)]
