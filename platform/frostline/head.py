"""Heads: what is put on top of a backbone's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frostline.closedform import ridge
from frostline.spec import Head, Task
from frostline.targets import Target


class SeededDropout(nn.Module):
    """Dropout from a stream of its own (`seed_dropout`), so that a head draws the same in whatever company it trains.

    `p` is rounded to a multiple of 2^-16: comparing 16 random bits takes an eighth of the time of a Bernoulli draw.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.seed = 0
        self.generator: torch.Generator | None = None
        self.rows: tuple[slice, int] | None = None
        self.drawn: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """The inputs times the next noise of the stream; in eval mode, or where p is 0, the inputs."""
        if not (self.training and self.p):
            return inputs
        if self.rows is None:
            return inputs * self.noise(inputs)
        rows, size = self.rows
        if self.drawn is None:
            self.drawn = self.noise(inputs.new_empty(size, *inputs.shape[1:]))
        return inputs * self.drawn[rows]

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
            module.rows = module.drawn = None


def show_rows(head: nn.Module, rows: slice, size: int, *, begin: bool) -> None:
    """Say which rows of a batch of `size` the head is given next, where it is not given all at once: whoever computes a row, it
    gets the noise that it gets in the whole batch. `begin` says that the batch is a new one."""
    for module in head.modules():
        if isinstance(module, SeededDropout):
            module.rows = rows, size
            if begin:
                module.drawn = None


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


def set_probe(head: nn.Sequential, features: Tensor, labels: Tensor, task: Task = "classification") -> None:
    """Set the last layer to the ridge solution on its inputs for (N, D) features and what they are to give, as training has it: for a
    linear head that is the probe from which LP-FT (Kumar et al. 2022) starts, for an MLP the ridge on what its random hidden layer makes
    of them.
    """
    *hidden, _, out = head
    assert isinstance(out, nn.Linear)
    with torch.no_grad():
        inputs = nn.Sequential(*hidden)(features.to(out.weight))
        solution = ridge(inputs.cpu(), labels.cpu(), out.out_features, task)
        out.weight.copy_(solution.weight)
        out.bias.copy_(solution.bias)


@torch.no_grad()
def in_units(head: nn.Sequential, target: Target) -> None:
    """Make a trained head of a regression give labels as the data has them; others give what they gave."""
    out = head[-1]
    assert isinstance(out, nn.Linear)
    if target != Target(target.task):
        out.weight.mul_(target.std)
        out.bias.mul_(target.std).add_(target.mean)
