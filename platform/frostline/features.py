"""What a trial reads: normalised images, or, where only the head trains, features that each image yields once.

Features are exact: the frozen backbone is deterministic and no random transform stands before it, so a trial gets the
numbers that it would have computed itself. They are kept in memory, per process, which trials of a search share.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from frostline.backbone import Backbone
from frostline.data import Dataset
from frostline.world import mixed

EVAL_BATCH = 64

Fetch = Callable[[np.ndarray], Tensor]
"""Sample numbers (B,) to what the network is fed: (B, 3, H, W) images or (B, D) features, float32, on the device."""


@dataclass
class FeatureStore:
    """Features by backbone, data and sample numbers, the most recently used kept up to a budget of bytes."""

    budget_bytes: int = 1 << 30
    images_forwarded: int = 0
    _kept: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)

    def features(
        self,
        backbone: Backbone,
        module: nn.Module,
        dataset: Dataset,
        samples: np.ndarray,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> Tensor:
        """(n, D) float32 pooled features of these samples under `module`, a copy on `device` of the pretrained backbone,
        in the precision of a live forward pass."""
        chosen = hashlib.sha256(samples.tobytes()).hexdigest()
        network = f"{backbone.name}/{backbone.source_hash}/{backbone.weights_hash}/{backbone.stages_hash}"
        key = f"{network}/{dataset.data_hash}/{dataset.pixels_hash}/{device}/{autocast}/{chosen}"
        if key not in self._kept:
            self._kept[key] = extract(module, image_fetch(backbone, dataset, device), samples, device, autocast)
            self.images_forwarded += len(samples)
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self.budget_bytes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


@torch.no_grad()
def extract(
    module: nn.Module, images: Fetch, samples: np.ndarray, device: torch.device, autocast: torch.dtype | None
) -> Tensor:
    """One pass of these samples through a backbone in eval mode: (n, D) float32. A pure function of its arguments."""
    module.eval()
    with mixed(device, autocast):
        return torch.cat([module(images(chunk)).float() for chunk in chunks(samples, EVAL_BATCH)])


def image_fetch(backbone: Backbone, dataset: Dataset, device: torch.device) -> Fetch:
    """Read samples as normalised images, channels last in memory."""
    mean = 255 * torch.tensor(backbone.mean, device=device).view(1, 3, 1, 1)
    std = 255 * torch.tensor(backbone.std, device=device).view(1, 3, 1, 1)

    def fetch(samples: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(dataset.pixels[samples]).to(device)  # (B, H, W, 3) uint8
        return pixels.permute(0, 3, 1, 2).float().sub_(mean).div_(std)

    return fetch


def feature_fetch(table: Tensor, samples: np.ndarray) -> Fetch:
    """Read samples as rows of the (n, D) features of `samples`, which are sorted."""
    return lambda wanted: table[torch.from_numpy(np.searchsorted(samples, wanted)).to(table.device)]


def chunks(samples: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive pieces of at most `size` samples."""
    return (samples[start : start + size] for start in range(0, len(samples), size))
