"""Low-rank adapters: LoRA (Hu et al. 2022) and DoRA (Liu et al. 2024), as peft has them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from frostline.seeds import derive_seed
from frostline.spec import Freeze
from frostline.stages import Stage

BASE, UPDATE = ".base_layer.", ".lora_"  # in the names of what peft wraps, and of what it adds
RANK = 8


class AdapterError(ValueError):
    """Adapters that this installation or this backbone cannot have."""


def adapt(module: nn.Module, freeze: Freeze, stages: Sequence[Stage], seed: int) -> None:
    """Give every linear layer and 1x1 convolution of these stages a low-rank update, in place, if the strategy is one with
    adapters; it starts at zero, so that the network's output is what it was. Raises AdapterError.

    Names change: `x.weight` is `x.base_layer.weight`, and beside it there are `x.lora_A.default.weight` and others.
    """
    if freeze.strategy not in ("lora", "dora"):
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise AdapterError(
            f"strategy = {freeze.strategy!r} needs the package peft: pip install 'frostline[peft]'"
        ) from error
    inside = {tensor for stage in stages for tensor in stage.tensors}
    layers = [name for name, layer in _layers(module) if f"{name}.weight" in inside]
    if stages and not layers:
        names = ", ".join(stage.name for stage in stages)
        raise AdapterError(f"strategy = {freeze.strategy!r}: there is no linear layer or 1x1 convolution in {names}")
    rank = freeze.rank or RANK
    config = LoraConfig(
        r=rank,
        lora_alpha=freeze.alpha or 2 * rank,  # pyright: ignore[reportArgumentType] (it takes any number)
        target_modules=f"^({'|'.join(map(re.escape, layers))})$",
        use_dora=freeze.strategy == "dora",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "adapter"))
        if layers:
            inject_adapter_in_model(config, module)


def original(name: str) -> tuple[str, bool]:
    """The name that a tensor of an adapted network has in the backbone as it came, and whether it is an adapter's own: then
    the name is that of the weight it updates."""
    if UPDATE in name:
        return f"{name.partition(UPDATE)[0]}.weight", True
    return name.replace(BASE, "."), False


def _layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those that an update fits to. Multi-head attention of PyTorch's own reads its projection's weight past the layer."""
    inner = {id(part.out_proj) for part in module.modules() if isinstance(part, nn.MultiheadAttention)}
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if id(layer) not in inner
        and (
            isinstance(layer, nn.Linear)
            or (isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1} and layer.groups == 1)
        )
    ]
