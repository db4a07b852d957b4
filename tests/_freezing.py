"""Every strategy with the keys that it needs, a network under it, and data to train that on."""

from __future__ import annotations

import copy
from typing import Any, get_args

import numpy as np
import torch

from frostline.adapters import adapt
from frostline.backbone import Backbone
from frostline.freeze import Applied, Network, apply_plan, compile_plan
from frostline.head import build_head
from frostline.spec import Freeze, Head, Strategy
from frostline.training import Batches

CLASSES, EPOCHS = 3, 4

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
NEEDED: dict[str, dict[str, Any]] = {
    "freeze_depth": {"depth": 2},
    "surgical": {"depth": 1},
    "layer_decay": {"layer_decay": 0.5},
    "discriminative": {"lr_ratio": 0.1},
}


def freezing(strategy: str, **keys: Any) -> Freeze:
    """This strategy, with these keys and those that it cannot be without."""
    return Freeze.model_validate({"strategy": strategy, **NEEDED.get(strategy, {}), **keys})


def network_of(
    backbone: Backbone, freeze: Freeze, epochs: int = EPOCHS, dropout: float = 0.1
) -> tuple[Network, list[Applied]]:
    """A network under this strategy."""
    head = build_head(Head(dropout=dropout), backbone.feature_dim, CLASSES, seed=0)
    network = Network(copy.deepcopy(backbone.module), head)
    plan = compile_plan(freeze, backbone.stages, epochs=epochs)
    adapt(network.backbone, freeze, backbone.stages[plan.cut :], seed=0)
    return network, apply_plan(plan, network, backbone)


def batches(size: int, samples: int) -> Batches:
    """Noise of `size` pixels a side, the classes in turn."""
    images = torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Batches(
        lambda wanted, _: images[torch.from_numpy(wanted)], np.arange(samples), torch.arange(samples) % CLASSES
    )
