"""Heads: what is put on top of a backbone's pooled features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from frostline.spec import Head

PENALTIES = tuple(10 ** (k / 2) for k in range(-8, 5))  # in mean eigenvalues of the features' scatter
SCALES = tuple(2.0**k for k in range(8))


class SeededDropout(nn.Module):
    """Dropout from a stream of its own (`seed_dropout`), so that a head draws the same in whatever company it trains.

    `p` is rounded to a multiple of 2^-16: comparing 16 random bits takes an eighth of the time of a Bernoulli draw.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.seed = 0
        self.generator: torch.Generator | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """The inputs times the next noise of the stream; in eval mode, or where p is 0, the inputs."""
        return inputs * self.noise(inputs) if self.training and self.p else inputs

    def noise(self, like: Tensor) -> Tensor:
        """The next of the stream, of this shape, dtype and device: 0 with probability p, else 1 / (1 - p)."""
        if self.generator is None:
            self.generator = torch.Generator(like.device).manual_seed(self.seed)
        dropped = min(round(self.p * 65536), 65535)
        words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
        bits = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)[: like.numel()]
        return (bits >= dropped - 32768).view(like.shape).to(like.dtype) * (65536 / (65536 - dropped))


def seed_dropout(head: nn.Module, seed: int) -> None:
    """Start the dropout of a head again, from `seed`; its stream is made on the device of the first inputs."""
    for module in head.modules():
        if isinstance(module, SeededDropout):
            module.seed, module.generator = seed, None


def build_head(head: Head, features: int, classes: int, seed: int) -> nn.Sequential:
    """A linear or MLP head, (N, features) -> (N, classes); the same `seed` gives the same weights.

    `init = "probe"` starts like "random" here; `set_probe` then lays the closed-form solution over it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        out = nn.Linear(head.hidden or features, classes)
        hidden = [nn.Linear(features, head.hidden), nn.ReLU()] if head.hidden else []
    if head.init == "zero":
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
    return nn.Sequential(*hidden, SeededDropout(head.dropout), out)


def set_probe(head: nn.Sequential, features: Tensor, labels: np.ndarray) -> None:
    """Set a linear head to the ridge solution on (N, D) features, the head that LP-FT (Kumar et al. 2022) starts from.

    The ridge penalty and the scale of the logits are those with the lowest leave-one-out NLL, which is exact for ridge.
    """
    out = head[-1]
    assert isinstance(out, nn.Linear)
    assert len(head) == 2
    truth = torch.from_numpy(labels).long()
    targets = functional.one_hot(truth, out.out_features).double()
    candidates = (
        (float(functional.cross_entropy(scale * ridge.left_out, truth)), scale, ridge)
        for ridge in ridge_path(features.cpu().double(), targets, PENALTIES)
        for scale in SCALES
    )
    _, scale, best = min(candidates, key=lambda candidate: candidate[0])
    with torch.no_grad():
        out.weight.copy_(scale * best.weight)
        out.bias.copy_(scale * best.bias)


@dataclass(frozen=True)
class Ridge:
    """A ridge regression with an intercept that is not penalised."""

    penalty: float
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    left_out: Tensor  # (N, C): what the fit to all other samples predicts for each


def ridge_path(inputs: Tensor, targets: Tensor, penalties: Iterable[float]) -> Iterator[Ridge]:
    """Ridge regressions of (N, C) targets on (N, D) inputs, one per penalty (given in mean eigenvalues of the scatter),
    from one eigendecomposition of the smaller Gram matrix; float64 in and out."""
    centre, share = inputs.mean(dim=0), targets.mean(dim=0)
    inputs, rest = inputs - centre, targets - share
    if len(inputs) >= inputs.shape[1]:
        eigenvalues, basis = torch.linalg.eigh(inputs.T @ inputs)
        scores = dual = inputs @ basis
    else:
        eigenvalues, dual = torch.linalg.eigh(inputs @ inputs.T)
        basis = inputs.T @ dual
        scores = dual * eigenvalues
    projected, overlap = dual.T @ rest, scores * dual
    unit = float(eigenvalues.mean().clamp(min=1e-30))
    for penalty in (unit * factor for factor in penalties):
        gain = 1 / (eigenvalues.clamp(min=0) + penalty)  # (K,)
        solution = gain[:, None] * projected  # (K, C)
        weight = (basis @ solution).T
        leverage = overlap @ gain + 1 / len(inputs)
        residual = rest - scores @ solution
        left_out = targets - residual / (1 - leverage).clamp(min=1e-9)[:, None]
        yield Ridge(penalty, weight, share - weight @ centre, left_out)
