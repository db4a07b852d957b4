"""What is frozen: a strategy compiled for one backbone into a freeze plan, applied to a network, and audited.

A plan is one ordered table of rules; it alone decides gradients, optimizer groups and the eval mode of frozen modules.
Every parameter has an address `STAGE/KIND/NAME` (`blocks.2/norm/blocks.2.0.bn1.weight`, `head/weight/out.weight`; KIND
is `norm`, `bias` or `weight`). The first rule whose pattern matches the address decides; an address that none matches
is an error.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from frostline.backbone import Backbone, Stage
from frostline.depths import depth_of
from frostline.spec import Freeze

HEAD = "head"


class FreezeError(RuntimeError):
    """A network, a plan and an optimizer that do not say the same about what is frozen."""


@dataclass(frozen=True)
class Rule:
    """Parameters whose address matches `pattern` train at `multiplier` times their base rate, or are frozen (None)."""

    pattern: str
    multiplier: float | None


@dataclass(frozen=True)
class Plan:
    """A strategy compiled for one backbone."""

    rules: tuple[Rule, ...]
    cut: int
    """Index of the first stage that is not frozen; `end` where only the head trains."""
    end: int
    """The number of stages that the head stands on; those after them do not run, and are frozen."""
    live_statistics: bool
    """Whether norm layers of trainable stages normalise by batch statistics and update their running ones."""
    recalibrate: bool
    """Whether running statistics of trainable stages are recomputed on the train split before training."""

    @property
    def only_head(self) -> bool:
        """Whether no stage trains."""
        return self.cut == self.end

    def multiplier(self, address: str) -> float | None:
        """The first matching rule's multiplier, None where that rule freezes. Raises FreezeError if no rule matches."""
        for rule in self.rules:
            if fnmatchcase(address, rule.pattern):
                return rule.multiplier
        raise FreezeError(f"no rule of the freeze plan covers the parameter {address}")


class Network(nn.Module):
    """A backbone under a head. Parameters are named `backbone.…` and `head.…`."""

    backbone: nn.Module
    head: nn.Sequential

    def __init__(self, backbone: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) normalised images to (N, classes) logits."""
        return self.head(self.backbone(images))


@dataclass(frozen=True)
class Applied:
    """A plan as it holds for one network's tensors, by their names in `Network`."""

    trained: Mapping[str, float]
    """Trainable parameter -> learning-rate multiplier."""
    undecayed: frozenset[str]
    """Trainable norm parameters and biases: no weight decay."""
    fixed: frozenset[str]
    """Parameters and buffers that training must leave bit-equal."""
    eval_modules: frozenset[str]
    """Modules that stay in eval mode: stages that are frozen or do not run whole, and norm layers whose statistics are
    fixed."""
    recalibrated: frozenset[str]
    """Norm layers whose running statistics are recomputed before training."""


def compile_plan(freeze: Freeze, stages: Sequence[Stage], end: int | None = None) -> Plan:
    """The freeze plan of a strategy for a backbone with these stages, under a head on the first `end` of them (all, when
    not given).

    Learning rates fall by `layer_decay` per stage from the last one towards the input (Clark et al. 2020, BEiT).
    """
    end = len(stages) if end is None else end
    cut = min(depth_of(freeze, len(stages)), end)
    frozen = [Rule(f"{glob.escape(stage.name)}/*", None) for stage in (*stages[:cut], *stages[end:])]
    norms = [Rule("*/norm/*", None)] if freeze.norm == "frozen" else []
    trained = [
        Rule(f"{glob.escape(stage.name)}/*", freeze.layer_decay ** (end - 1 - index))
        for index, stage in enumerate(stages[:end])
        if index >= cut
    ]
    rules = (Rule(f"{HEAD}/*", 1.0), *frozen, *norms, *trained)
    return Plan(rules, cut, end, live_statistics=freeze.norm == "batch", recalibrate=freeze.norm == "recalibrate")


def apply_plan(plan: Plan, network: Network, backbone: Backbone) -> Applied:
    """Put the plan into force: the one place where `requires_grad` is assigned. Gradients from before are dropped (P5)."""
    addresses = dict(_addresses(network, backbone.stages))
    multipliers = {name: plan.multiplier(address) for name, address in addresses.items()}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(multipliers[name] is not None)
        parameter.grad = None

    frozen_modules = {
        f"backbone.{name}".rstrip(".")
        for name, stage in backbone.module_stage.items()
        if not plan.cut <= stage < plan.end
    }
    statistics = {
        name
        for name, module in network.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats and name not in frozen_modules
    }
    eval_modules = frozen_modules if plan.live_statistics else frozen_modules | statistics
    moving = {f"{name}.{buffer}" for name in statistics for buffer, _ in network.get_submodule(name).named_buffers()}
    buffers = {name for name, _ in network.named_buffers()}
    return Applied(
        trained={name: value for name, value in multipliers.items() if value is not None},
        undecayed=frozenset(
            name for name, value in multipliers.items() if value is not None and "/weight/" not in addresses[name]
        ),
        fixed=frozenset(name for name, value in multipliers.items() if value is None)
        | (buffers - moving if plan.live_statistics else buffers),
        eval_modules=frozenset(eval_modules),
        recalibrated=frozenset(statistics if plan.recalibrate else ()),
    )


def pretrained_names(network: Network, applied: Applied) -> set[str]:
    """Tensors that hold the backbone's own values after training: what is fixed, recalibrated statistics apart."""
    recalibrated = {
        f"{name}.{buffer}" for name in applied.recalibrated for buffer, _ in network.get_submodule(name).named_buffers()
    }
    return set(applied.fixed - recalibrated)


def train_mode(network: nn.Module, applied: Applied) -> None:
    """`network.train()` with everything that is frozen put back into eval mode (P3)."""
    network.train()
    for name in applied.eval_modules:
        network.get_submodule(name).training = False


def fixed_hash(network: Network, applied: Applied) -> str:
    """16 hex digits of the SHA-256 over every tensor that training must leave alone: name and bytes (P1)."""
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    sha = hashlib.sha256()
    for name in sorted(applied.fixed):
        sha.update(name.encode())
        sha.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def check_masks(network: Network, applied: Applied, optimizer: torch.optim.Optimizer) -> None:
    """Declared mask == requires_grad == contents of the optimizer, each parameter once (P9, P10). Raises FreezeError."""
    declared = set(applied.trained)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    requires = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    grouped = [names.get(id(p), "?") for group in optimizer.param_groups for p in group["params"]]
    for what, found in (("requires_grad", requires), ("the optimizer", set(grouped))):
        if found != declared:
            raise FreezeError(f"{what} and the freeze plan differ on {_some(found ^ declared)}")
    if len(grouped) != len(set(grouped)):
        raise FreezeError(f"in two optimizer groups: {_some({name for name in grouped if grouped.count(name) > 1})}")


def check_gradients(network: Network, applied: Applied) -> None:
    """After a backward pass every trained parameter has a gradient and every frozen one none (P11). Raises FreezeError."""
    found = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    if found != set(applied.trained):
        raise FreezeError(f"gradients and the freeze plan differ on {_some(found ^ set(applied.trained))}")


def stage_rates(applied: Applied, stages: Sequence[Stage], lr: float, head_lr: float) -> dict[str, float]:
    """Stage name -> its peak learning rate, 0.0 where nothing of it trains, and the head's."""
    rates = {
        stage.name: lr * max((applied.trained.get(f"backbone.{tensor}", 0.0) for tensor in stage.tensors), default=0.0)
        for stage in stages
    }
    return {**rates, HEAD: head_lr}


def _addresses(network: Network, stages: Iterable[Stage]) -> Iterator[tuple[str, str]]:
    stage_of = {f"backbone.{tensor}": stage.name for stage in stages for tensor in stage.tensors}
    norms = {name for name, module in network.named_modules() if is_norm(module)}
    for name, _ in network.named_parameters():
        owner, _, leaf = name.rpartition(".")
        kind = "norm" if owner in norms else "bias" if "bias" in leaf else "weight"
        yield name, f"{stage_of.get(name, HEAD)}/{kind}/{name.partition('.')[2]}"


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, by type: torch's own, or one whose class is named like them (timm's)."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
    return isinstance(module, kinds) or ("Norm" in type(module).__name__ and not any(module.children()))


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
