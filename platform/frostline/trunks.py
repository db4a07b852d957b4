"""Bundles that differ in their heads only: which of them do, and one pass through their backbone for all of their heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from frostline.bundle import Bundle
from frostline.models import digest
from frostline.weights import hash_tensors


@dataclass(frozen=True, eq=False)
class Trunk:
    """A backbone, and the heads of all bundles that stand on it."""

    bundle: Bundle
    """One of them: its backbone is that of all."""
    heads: Mapping[str, nn.Module]
    """By the name of their bundle."""

    def logits(self, rows: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Name of a bundle -> (N, C), of rows as `Bundle.pass_through` takes them, in one pass."""
        made, _ = self.bundle.pass_heads(rows, [self.heads[name] for name in names], fill=False)
        return dict(zip(names, made, strict=True))


def trunk_of(bundles: Mapping[str, Bundle]) -> Trunk:
    """Of bundles with the same `trunk_id`."""
    return Trunk(next(iter(bundles.values())), {name: bundle.network.head for name, bundle in bundles.items()})


def trunk_id(bundle: Bundle) -> str:
    """16 hex digits over all that makes a bundle's features of a sample's bytes, so that those of two bundles with the same one are
    the same to the bit: tensors as they are after training, where the network ends, rounding, precision, preprocessing."""
    spec = bundle.spec
    adapts = spec.config.freeze.strategy in ("lora", "dora")
    rounds = [bundle.plan.cut, bundle.plan.only_head, spec.features.dtype] if bundle.rounds else None
    return digest(
        [
            hash_tensors(bundle.network.backbone.state_dict().items()),
            [spec.backbone.name, bundle.about["stages_hash"], bundle.plan.end],
            spec.config.freeze.model_dump(mode="json") if adapts else None,
            [rounds, spec.config.train.precision, spec.resources.model_dump(mode="json")],
            [bundle.about["preprocessing"], spec.data.max_megapixels],
        ]
    )
