"""What a network is fed, by modality: from the rows of a dataset to the tensor that it takes, and from activations at a cut to
the features of a head. This is where images and texts differ; all that trains, stores and compares them does not.

Padding of a text is all zeros at every cut (`encoder` sees to that), so that an activation says itself which of its positions
are padding, and the rest of a network needs nothing beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from frostline.closedform import pooled
from frostline.spec import Pool
from frostline.versions import versions

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Images:
    """Square RGB images, normalised by channel. Their size is the side in pixels."""

    mean: Triple
    std: Triple
    noun: ClassVar[str] = "image"
    pool: ClassVar[Pool] = "mean"

    def fed(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """(B, size, size, 3) uint8 pixels to (B, 3, size, size) images in torch's default dtype, channels last in memory."""
        mean, std = (255 * torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        images = torch.from_numpy(rows).to(device).permute(0, 3, 1, 2).to(torch.get_default_dtype())
        return images.sub_(mean).div_(std)

    def noise(self, count: int, size: int) -> Tensor:
        """(count, 3, size, size): the same every time."""
        return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    def pooled(self, activations: Tensor) -> Tensor:
        """(N, …) activations as (N, D) features: the mean over positions."""
        return pooled(activations)

    def about(self) -> dict[str, Any]:
        """Everything about feeding and pooling that could change an activation, as JSON values."""
        return {"mean": list(self.mean), "std": list(self.std)}


@dataclass(frozen=True)
class Texts:
    """Texts as the ids of tokens, padded to one length. Their size is that length."""

    vocabulary: int
    """How many ids there are."""
    pad: int
    """The id of padding."""
    types: int
    """How many kinds of tokens the network tells apart: 2 where it knows the first text of a pair from the second."""
    longest: int
    """How many tokens the network takes."""
    pool: Pool
    noun: ClassVar[str] = "text"

    def fed(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """(B, size, 2) int32 ids and types of tokens to (B, 2, size) int64."""
        return torch.from_numpy(rows).to(device).permute(0, 2, 1).long()

    def noise(self, count: int, size: int) -> Tensor:
        """(count, 2, size) int64: the same every time, the first text the longest and the others padded."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary - 1, (count, size), generator=generator)
        ids += ids >= self.pad
        for number in range(1, count):
            ids[number, size - number * size // (count + 1) :] = self.pad
        return torch.stack([ids, torch.zeros_like(ids)], dim=1)

    def pooled(self, activations: Tensor) -> Tensor:
        """(N, T, D) activations as (N, D) features: those of the first token, or their mean over all that are not padding."""
        if activations.ndim == 2:
            return activations
        if self.pool == "cls":
            return activations[:, 0]
        return activations.sum(dim=1) / real(activations).sum(dim=1, keepdim=True).clamp(min=1)

    def about(self) -> dict[str, Any]:
        """Everything about feeding and pooling that could change an activation, as JSON values; the last of them is pooled."""
        return {"pad": self.pad, "pooling": self.pool, "transformers": versions().get("transformers")}


Inputs = Images | Texts


def real(activations: Tensor) -> Tensor:
    """(N, T) of which tokens (N, T, D) are activations: those that are not all zeros are no padding."""
    return (activations != 0).any(dim=-1)
