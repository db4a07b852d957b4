"""Cutting a network into stages, ordered from input to output.

One real forward pass is recorded, call by call, with the tensors that each call uses (`record`). All else is read off that
recording: the stages of a network that lists none itself (`forward_groups`), whether a list of stages runs from input to
output (`make_stages`), which stage every module belongs to (`module_stages`), and what each costs (`stage_costs`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

ENOUGH_STAGES = 4  # `forward_groups` opens containers until it has this many


class BackboneError(ValueError):
    """A backbone that does not exist, cannot be read, or cannot be cut into stages; its text says what to do."""


@dataclass(frozen=True)
class Stage:
    """A piece of the backbone that is frozen or trained as a whole."""

    name: str
    tensors: tuple[str, ...]
    """Names of its parameters and buffers."""


@dataclass(frozen=True)
class StageCost:
    """What one stage costs; `share` is of the whole backbone, without any head."""

    name: str
    parameters: int
    parameter_share: float
    flops: int
    """Of one image's forward pass; a multiply-add counts as two."""
    flop_share: float
    cut_bytes: int | None
    """Bytes per image, in float32, of the activation that leaves the stage; None where that is not one tensor."""


# An activation: tensors that share memory are one value. The weak reference keeps its identity from being used again.
Value = StorageWeakRef


@dataclass(frozen=True)
class Call:
    """One operator of a forward pass."""

    name: str
    tensors: frozenset[str]
    """Parameters and buffers that it computes with; to make a view of one is no use of it."""
    reads: frozenset[Value]
    """The activations among its arguments."""
    writes: Mapping[Value, int]
    """The activations among its results, and how many elements each has."""
    overwrites: frozenset[Value]
    """The activations among its arguments that it works on in place."""
    flops: int


@dataclass(frozen=True)
class Made:
    """A tensor in what a module returned."""

    value: Value
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Visit:
    """One run of a module."""

    module: str
    """Its name, the first one where it has several."""
    end: int
    """How many calls came before it returned."""
    output: Any
    """What it returned, with a `Made` in the place of every tensor."""


@dataclass(frozen=True)
class Recording:
    calls: tuple[Call, ...]
    """The first one stands for the input: it writes the images."""
    spans: Mapping[str, tuple[int, int]]
    """Parameter -> the first and the last call that uses it; the unused ones are not in it."""
    first_use: Mapping[str, int]
    """Parameter or buffer -> the first call that uses it."""
    entered: Mapping[str, int]
    """Module -> how many calls came before it first ran."""
    visits: tuple[Visit, ...]
    """In the order in which the modules returned."""
    output: Any


# What networks are known to raise on an image that does not suit them.
REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError)


def record(module: nn.Module, images: Tensor) -> Recording:
    """Run `module` in eval mode, without gradients, on `images` (N, 3, H, W), or texts (N, 2, T), and note every operator.

    Leaves no hook behind and restores the training flags. Raises BackboneError where the network refuses the images.
    """
    entered: dict[str, int] = {}
    visits: list[Visit] = []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        for child in module.modules():
            stack.callback(setattr, child, "training", child.training)
        module.eval()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no FLOP formula on a CPU: take it apart
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.no_grad())
        recorder = stack.enter_context(_Recorder(module, images))
        for name, child in module.named_modules(remove_duplicate=False):

            def note(*_: Any, name: str = name) -> None:
                entered.setdefault(name, len(recorder.calls))

            stack.callback(child.register_forward_pre_hook(note).remove)
        for name, child in module.named_modules():

            def leave(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                made = tree_map_only(Tensor, lambda tensor: Made(value_of(tensor), tuple(tensor.shape)), output)
                visits.append(Visit(name, len(recorder.calls), made))

            stack.callback(child.register_forward_hook(leave).remove)
        try:
            output = module(images)
        except REFUSALS as error:
            size = "x".join(map(str, images.shape[1:]))
            what, key = ("images", "image_size") if images.is_floating_point() else ("tokens", "max_tokens")
            raise BackboneError(
                f"the network refuses {size} {what} ({type(error).__name__}: {error}); try another data.{key}"
            ) from error
    calls = tuple(recorder.calls)
    first_use: dict[str, int] = {}
    last_use: dict[str, int] = {}
    for index, call in enumerate(calls):
        first_use |= dict.fromkeys(call.tensors - first_use.keys(), index)
        last_use |= dict.fromkeys(call.tensors, index)
    used = [name for name, _ in module.named_parameters(remove_duplicate=False) if name in first_use]
    spans = {name: (first_use[name], last_use[name]) for name in used}
    return Recording(calls, spans, first_use, entered, tuple(visits), output)


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what would keep the compiler off imports it (see `vision`), and nothing is compiled here

    def __init__(self, module: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.calls = [Call("input", frozenset(), frozenset(), {value_of(images): images.numel()}, frozenset(), 0)]
        self._names: dict[Value, list[str]] = {}
        for name, tensor in named_tensors(module):
            self._names.setdefault(value_of(tensor), []).append(name)
        self._activations = {value_of(images)}  # values that depend on the images

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = {value_of(tensor) for tensor in _tensors((args, kwargs))}
        made = {value_of(tensor): tensor.numel() for tensor in _tensors(result)}
        is_view = made.keys() <= read and not func._schema.is_mutable
        names = frozenset(name for value in read for name in self._names.get(value, ()) if not is_view)
        reads = frozenset(read & self._activations)
        writes = made if reads else {}
        overwrites = frozenset(reads & made.keys() if func._schema.is_mutable else ())
        self._activations |= writes.keys()
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        self.calls.append(Call(func.overloadpacket.__name__, names, reads, writes, overwrites, flops))
        return result


def value_of(tensor: Tensor) -> Value:
    return StorageWeakRef(tensor.untyped_storage())


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, the ones that state dicts leave out included."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def listing(items: Sequence[str]) -> str:
    """The first ten of `items`, and how many more there are."""
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


def forward_groups(recording: Recording) -> list[list[str]]:
    """Names of parameters grouped in the order of execution, by one rule for all architectures, for `complete_groups`.

    The children of the network are the groups; while these are fewer than four, the container with most tensors is opened.
    Bare layers in a row are one group, which a pooling ends.
    """
    opened = {""}
    while True:
        units: dict[str, list[str]] = {}
        for tensor in recording.spans:
            if unit := next((prefix for prefix in _modules_above(tensor) if prefix not in opened), None):
                units.setdefault(unit, []).append(tensor)
        containers = {unit for unit in units if any(t.count(".") > unit.count(".") + 1 for t in units[unit])}
        groups: list[list[str]] = []
        before = ""
        for unit in sorted(units, key=lambda unit: _span(units[unit], recording)):
            if groups and not containers & {before, unit} and not _pools_between(groups[-1], units[unit], recording):
                groups[-1] += units[unit]
            else:
                groups.append([*units[unit]])
            before = unit
        if len(groups) >= ENOUGH_STAGES or not containers:
            return groups
        opened.add(max(containers, key=lambda unit: len(units[unit])))


def complete_groups(module: nn.Module, recording: Recording, groups: Iterable[Iterable[str]]) -> list[list[str]]:
    """Every tensor of `module` in one group, in the order of execution, from `groups` of its parameters.

    Groups whose executions overlap are one, since no frozen prefix could end between them; so are a group of vectors only (a
    final norm) and the one before it. A tensor in no group, or directly in a module that spans several (a class token), joins
    the group that its module lies in, or else the one that runs at its first use.
    """
    tensors = dict(named_tensors(module))
    given = {name: index for index, group in enumerate(groups) for name in group}
    spanned = _groups_below(given)
    kept: dict[int, list[str]] = {}
    for name, index in given.items():
        if len(spanned[[*_modules_above(name)][-1]]) == 1 and name in recording.spans:
            kept.setdefault(index, []).append(name)

    def only_vectors(names: Iterable[str]) -> bool:
        return all(tensors[name].numel() == max(tensors[name].shape, default=1) for name in names)

    merged: list[list[str]] = []
    for group in sorted(kept.values(), key=lambda group: _span(group, recording)):
        if merged and (
            _span(group, recording)[0] <= _span(merged[-1], recording)[1]
            or only_vectors(group)
            or only_vectors(merged[-1])
        ):
            merged[-1] += group
        else:
            merged.append(group)
    if not merged:
        raise BackboneError("no module in it holds parameters that a forward pass uses, so there is nothing to freeze")
    group_of = {name: index for index, group in enumerate(merged) for name in group}
    below = _groups_below(group_of)
    running = _running(recording, group_of)
    for name in tensors.keys() - group_of.keys():
        around = next((below[above] for above in reversed([*_modules_above(name)]) if above in below), set())
        if len(around) == 1:
            (index,) = around
        else:
            index = running[recording.first_use.get(name, 0)]
        merged[index].append(name)
    order = {name: index for index, name in enumerate(tensors)}
    return [sorted(group, key=order.__getitem__) for group in merged]


def make_stages(
    module: nn.Module, recording: Recording, groups: Sequence[Sequence[str]], names: Sequence[str] = ()
) -> tuple[Stage, ...]:
    """Stages from groups of tensor names, input to output; without `names` a stage is called after what runs first in it.

    Raises BackboneError unless every parameter and buffer is in exactly one stage, every parameter takes part in the
    forward pass, and each stage is through before the next one begins.
    """
    names = names or _names(groups, recording)
    holders: dict[str, list[str]] = {tensor: [] for tensor, _ in named_tensors(module)}
    for name, group in zip(names, groups, strict=True):
        for tensor in group:
            holders[tensor].append(name)
    if missing := [tensor for tensor, by in holders.items() if not by]:
        raise BackboneError(f"no stage holds {listing(missing)}; every parameter and buffer belongs to one stage")
    if double := [f"{tensor} ({' and '.join(by)})" for tensor, by in holders.items() if len(by) > 1]:
        raise BackboneError(f"in more than one stage: {listing(double)}; every parameter and buffer belongs to one")
    first_names: dict[int, str] = {}
    for name, tensor in named_tensors(module):
        other = first_names.setdefault(id(tensor), name)
        if holders[other] != holders[name]:
            raise BackboneError(
                f"{other} (stage {holders[other][0]!r}) and {name} (stage {holders[name][0]!r}) are one tied tensor, so "
                "neither stage could be frozen alone; put both into one stage"
            )
    if idle := [name for name, _ in module.named_parameters() if name not in recording.spans]:
        raise BackboneError(
            f"{listing(idle)}: no part in the features of an image (an auxiliary or alternative output?), so never trained; "
            "take a variant of the network without them"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise BackboneError(f"{listing(twice)}: two stages of one name; give every stage its own")
    if empty := [name for name, group in zip(names, groups, strict=True) if recording.spans.keys().isdisjoint(group)]:
        raise BackboneError(f"nothing could be trained in {listing(empty)}; every stage holds a parameter")
    end, before = -1, ""
    for name, group in zip(names, groups, strict=True):
        first, last = _span(group, recording)
        if first <= end:
            raise BackboneError(
                f"stage {name!r} starts before stage {before!r} is through, so freezing up to {before!r} would not fix what "
                "leaves it; stages must follow the order of execution"
            )
        end, before = last, name
    return tuple(Stage(name, tuple(group)) for name, group in zip(names, groups, strict=True))


def module_stages(module: nn.Module, recording: Recording, stages: Sequence[Stage]) -> dict[str, int]:
    """The stage of every module, to decide its training flag: it is fixed exactly when that stage is frozen.

    With tensors in or below it: the last stage that these are in. Without: the stage that ran when it was first entered;
    where it never was (fused attention passes its dropout by), the stage around it, or of the module before it.
    """
    stage_of = {tensor: index for index, stage in enumerate(stages) for tensor in stage.tensors}
    below = _groups_below(stage_of)
    running = _running(recording, stage_of)
    result: dict[str, int] = {}
    previous = 0
    for name, _ in module.named_modules(remove_duplicate=False):
        around = next((below[above] for above in reversed([*_modules_above(f"{name}.")]) if above in below), {0})
        if name in below:
            previous = max(below[name])
        elif name in recording.entered:
            previous = running[recording.entered[name] - 1]
        elif len(around) == 1:
            (previous,) = around
        result[name] = previous
    return result


def stage_costs(module: nn.Module, stages: Sequence[Stage], images: Tensor) -> tuple[StageCost, ...]:
    """Size, work and cut of every stage, measured on one forward pass of `images` (N, 3, H, W).

    Raises BackboneError where the network refuses the images.
    """
    recording = record(module, images)
    stage_of = {tensor: index for index, stage in enumerate(stages) for tensor in stage.tensors}
    flops: Counter[int] = Counter()
    for stage, call in zip(_running(recording, stage_of), recording.calls, strict=True):
        flops[stage] += call.flops // len(images)
    sizes = dict(module.named_parameters())
    parameters = [sum(sizes[name].numel() for name in stage.tensors if name in sizes) for stage in stages]
    elements = {value: size for call in reversed(recording.calls) for value, size in call.writes.items()}
    cuts = [
        min((elements[value] for value in lone.values()), default=None) for lone in lone_activations(recording, stages)
    ]
    cuts.append(recording.output.numel())
    return tuple(
        StageCost(
            name=stage.name,
            parameters=parameters[i],
            parameter_share=parameters[i] / sum(parameters),
            flops=flops[i],
            flop_share=flops[i] / max(1, flops.total()),
            cut_bytes=None if cut is None else 4 * cut // len(images),
        )
        for i, (stage, cut) in enumerate(zip(stages, cuts, strict=True))
    )


def lone_activations(recording: Recording, stages: Sequence[Stage]) -> list[dict[int, Value]]:
    """Where all that is still to come depends on one activation: a dict for each boundary between two stages, from every
    such position there (how many calls come before it) to that activation."""
    born: dict[Value, int] = {}
    last_read: dict[Value, int] = {}
    for index, call in enumerate(recording.calls):
        last_read.update(dict.fromkeys(call.reads, index))
        for value in call.writes:
            born.setdefault(value, index)
    spans = [_span(stage.tensors, recording) for stage in stages]
    boundaries = []
    for (_, end), (start, _) in pairwise(spans):
        lone = {}
        for position in range(end + 1, start + 1):
            alive = [value for value, read in last_read.items() if born[value] < position <= read]
            if len(alive) == 1:
                lone[position] = alive[0]
        boundaries.append(lone)
    return boundaries


def _modules_above(tensor: str) -> Iterator[str]:
    """Names of the modules around a tensor, outermost (the root, "") first."""
    yield ""
    parts = tensor.split(".")[:-1]
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def _groups_below(group_of: Mapping[str, int]) -> dict[str, set[int]]:
    """Module -> the groups of the tensors in and below it."""
    below: dict[str, set[int]] = {}
    for tensor, index in group_of.items():
        for module in _modules_above(tensor):
            below.setdefault(module, set()).add(index)
    return below


def _running(recording: Recording, group_of: Mapping[str, int]) -> list[int]:
    """For each call the group whose parameters were used last, that call's own included; 0 before any."""
    running = [0]
    for call in recording.calls:
        used = [group_of[name] for name in call.tensors if name in group_of and name in recording.spans]
        running.append(max(used, default=running[-1]))
    return running[1:]


def _span(tensors: Iterable[str], recording: Recording) -> tuple[int, int]:
    """The first and the last call that uses any parameter among `tensors`; at least one is used."""
    spans = [recording.spans[name] for name in tensors if name in recording.spans]
    return min(first for first, _ in spans), max(last for _, last in spans)


def _pools_between(before: Iterable[str], after: Iterable[str], recording: Recording) -> bool:
    calls = recording.calls[_span(before, recording)[1] : _span(after, recording)[0]]
    return any("pool" in call.name for call in calls)


def _names(groups: Sequence[Sequence[str]], recording: Recording) -> list[str]:
    """For each group the shortest name that is a prefix, by whole words, of its first used tensor and of no other group's."""
    below = _groups_below({name: index for index, group in enumerate(groups) for name in group})
    names = []
    for index, group in enumerate(groups):
        first = min((name for name in group if name in recording.spans), key=lambda name: recording.spans[name])
        names.append(next((above for above in _modules_above(first) if above and below[above] == {index}), first))
    return names
