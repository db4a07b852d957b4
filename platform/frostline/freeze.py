"""What is frozen: a strategy compiled for one backbone into a freeze plan, applied to a network, and audited.

A plan has an ordered table of rules for each phase; it alone decides gradients, optimizer groups and the eval mode of frozen
modules. Every parameter has an address `STAGE/KIND/NAME` (`blocks.2/norm/blocks.2.0.bn1.weight`, `head/weight/out.weight`;
KIND is `norm`, `bias`, `adapter` or `weight`). The first rule whose pattern matches the address decides; an address that none
matches is an error.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from frostline.adapters import original
from frostline.backbone import Backbone, Stage
from frostline.collectives import full
from frostline.depths import depth_of
from frostline.spec import Freeze
from frostline.strategies import ALL, Phase, phases_of
from frostline.weights import hash_tensors

HEAD = "head"


class FreezeError(RuntimeError):
    """A network, a plan and an optimizer that do not say the same about what is frozen."""


@dataclass(frozen=True)
class Rule:
    """Parameters whose address matches `pattern` train at `multiplier` times their base rate, or are frozen (None)."""

    pattern: str
    multiplier: float | None


@dataclass(frozen=True)
class Table:
    """What trains in one phase of a strategy."""

    rules: tuple[Rule, ...]
    stages: frozenset[int]
    """Those of which something trains."""
    epochs: int = 1
    restart: bool = True
    """Whether schedule and optimizer begin anew with this phase."""

    def multiplier(self, address: str) -> float | None:
        """The first matching rule's multiplier, None where that rule freezes. Raises FreezeError if no rule matches."""
        for rule in self.rules:
            if fnmatchcase(address, rule.pattern):
                return rule.multiplier
        raise FreezeError(f"no rule of the freeze plan covers the parameter {address}")


@dataclass(frozen=True)
class Plan:
    """A strategy compiled for one backbone."""

    phases: tuple[Table, ...]
    cut: int
    """Index of the first stage that is not frozen throughout; `end` where only the head ever trains."""
    end: int
    """The number of stages that the head stands on; those after them do not run, and are frozen."""
    live_statistics: bool
    """Whether norm layers of trainable stages normalise by batch statistics and update their running ones."""
    recalibrate: bool
    """Whether running statistics of stages that will train are recomputed on the train split before training."""
    relative: bool = False
    """Whether each tensor's learning rate follows its relative gradient norm."""

    @property
    def only_head(self) -> bool:
        """Whether no stage ever trains."""
        return self.cut == self.end


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
    """A phase of a plan as it holds for one network's tensors, by their names in `Network`."""

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
    epochs: int = 1
    """Of the phase; the last one takes all that are left."""
    restart: bool = True
    """Whether schedule and optimizer begin anew."""
    relative: bool = False
    """Whether each backbone tensor's learning rate follows its relative gradient norm."""


def compile_plan(freeze: Freeze, stages: Sequence[Stage], end: int | None = None, epochs: int = 1) -> Plan:
    """The freeze plan of a strategy over so many epochs, for a backbone with these stages, under a head on the first `end` of
    them (all, when not given)."""
    end = len(stages) if end is None else end
    cut = min(depth_of(freeze, len(stages)), end)
    return Plan(
        tuple(_table(phase, freeze, stages) for phase in phases_of(freeze, cut, end, epochs)),
        cut,
        end,
        live_statistics=freeze.norm == "batch",
        recalibrate=freeze.norm == "recalibrate",
        relative=freeze.strategy == "auto_rgn",
    )


def _table(phase: Phase, freeze: Freeze, stages: Sequence[Stage]) -> Table:
    names = [glob.escape(stage.name) for stage in stages]
    frozen = [Rule(f"{name}/*", None) for index, name in enumerate(names) if index not in phase.rates]
    norms = [Rule("*/norm/*", None)] if freeze.norm == "frozen" else []
    trained = [Rule(f"{names[index]}/{phase.which}", rate) for index, rate in phase.rates.items()]
    others = [Rule(f"{names[index]}/*", None) for index in phase.rates if phase.which != ALL]
    rules = (Rule(f"{HEAD}/*", 1.0), *frozen, *norms, *trained, *others)
    return Table(rules, frozenset(phase.rates), phase.epochs, phase.restart)


def apply_plan(plan: Plan, network: Network, backbone: Backbone) -> list[Applied]:
    """What each phase of the plan means for the network, the first of which is put into force."""
    addresses = dict(_addresses(network, backbone.stages))
    phases = [_applied(plan, table, network, addresses, backbone) for table in plan.phases]
    enforce(network, phases[0])
    return phases


def enforce(network: Network, applied: Applied) -> None:
    """Put a phase into force: the one place where `requires_grad` is assigned. Gradients from before are dropped (P5)."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in applied.trained)
        parameter.grad = None


def _applied(plan: Plan, table: Table, network: Network, addresses: Mapping[str, str], backbone: Backbone) -> Applied:
    multipliers = {name: table.multiplier(address) for name, address in addresses.items()}
    _check_tied(network, backbone, table)

    def statistics(stages: Collection[int]) -> tuple[set[str], set[str]]:
        """Modules of all other stages, and norm layers of these that keep statistics."""
        others = {
            f"backbone.{name}".rstrip(".") for name, stage in backbone.module_stage.items() if stage not in stages
        }
        norms = {
            name
            for name, module in network.named_modules()
            if isinstance(module, _NormBase) and module.track_running_stats and name not in others
        }
        return others, norms

    frozen_modules, norms = statistics(table.stages)
    eval_modules = frozen_modules if plan.live_statistics else frozen_modules | norms
    moving = {f"{name}.{buffer}" for name in norms for buffer, _ in network.get_submodule(name).named_buffers()}
    buffers = {name for name, _ in network.named_buffers()}
    ever = frozenset[int]().union(*(each.stages for each in plan.phases))
    return Applied(
        trained={name: value for name, value in multipliers.items() if value is not None},
        undecayed=frozenset(
            name
            for name, value in multipliers.items()
            if value is not None and addresses[name].split("/")[1] in ("norm", "bias")
        ),
        fixed=frozenset(name for name, value in multipliers.items() if value is None)
        | (buffers - moving if plan.live_statistics else buffers),
        eval_modules=frozenset(eval_modules),
        recalibrated=frozenset(statistics(ever)[1] if plan.recalibrate else ()),
        epochs=table.epochs,
        restart=table.restart,
        relative=plan.relative,
    )


def whole(phases: Sequence[Applied]) -> Applied:
    """Of all phases together: what trains in any, and what stays as it is in all. Rates are the last phase's that has one."""
    trained = {name: rate for phase in phases for name, rate in phase.trained.items()}
    fixed = frozenset[str].intersection(*(phase.fixed for phase in phases))
    return replace(phases[-1], trained=trained, fixed=fixed)


def _check_tied(network: Network, backbone: Backbone, table: Table) -> None:
    """Tensors that several stages share train in all of them or in none. Raises FreezeError."""
    homes: dict[int, dict[bool, str]] = {}
    for name, parameter in network.backbone.named_parameters(remove_duplicate=False):
        stage = backbone.module_stage.get(name.rpartition(".")[0])
        if stage is not None:
            homes.setdefault(id(parameter), {}).setdefault(stage in table.stages, name)
    for home in homes.values():
        if len(home) == 2:
            raise FreezeError(
                f"{home[True]} would train and {home[False]} be frozen, and both are one tensor; choose a freeze.depth that "
                "treats their stages alike"
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
    """16 hex digits of `hash_tensors` over every tensor that training must leave alone (P1)."""
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return hash_tensors((name, full(state[name])) for name in sorted(applied.fixed))[:16]


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
    trained = {original(name)[0]: rate for name, rate in applied.trained.items()}
    rates = {
        stage.name: lr * max((trained.get(f"backbone.{tensor}", 0.0) for tensor in stage.tensors), default=0.0)
        for stage in stages
    }
    return {**rates, HEAD: head_lr}


def _addresses(network: Network, stages: Iterable[Stage]) -> Iterator[tuple[str, str]]:
    stage_of = {f"backbone.{tensor}": stage.name for stage in stages for tensor in stage.tensors}
    norms = {name for name, module in network.named_modules() if is_norm(module)}
    for name, _ in network.named_parameters():
        plain, adapter = original(name)
        owner, _, leaf = plain.rpartition(".")
        kind = "adapter" if adapter else "norm" if owner in norms else "bias" if "bias" in leaf else "weight"
        yield name, f"{stage_of.get(plain, HEAD)}/{kind}/{name.partition('.')[2]}"


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, by type: torch's own, or one whose class is named like them (timm's)."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
    return isinstance(module, kinds) or ("Norm" in type(module).__name__ and not any(module.children()))


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
