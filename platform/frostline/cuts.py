"""The activation at a cut: emitted by one forward pass, and the network resumed from it.

Between two stages one activation is all that the rest of the network depends on. Where a module returns it, a hook on that
module emits it, and the rest of the network is the network itself with that module returning the activation it is given,
and the modules before it returning placeholders of the right shape; code between modules runs as ever. Every cut has been
tried on a copy of the network, to the bit, before it is offered.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from frostline.backbone import Backbone
from frostline.closedform import pooled_width
from frostline.stages import REFUSALS, Made, Recording, Stage, Value, Visit, lone_activations, module_stages, record

Pooling = Callable[[Tensor], Tensor]
"""(N, …) activations to (N, D) features; see `inputs`."""


@dataclass(frozen=True)
class Hole:
    """Where a tensor of this shape, without the batch dimension, goes in what a module returns."""

    shape: tuple[int, ...]
    overwritten: bool
    """Whether code between modules works on it in place later, so that it needs memory of its own."""


@dataclass(frozen=True)
class Cut:
    """A place where the network can be left and resumed."""

    index: int
    """Of the first stage that comes after it; the number of stages where only the head does."""
    module: str
    """The module that returns the activation; "" at the last cut, where it is the features."""
    shape: tuple[int, ...]
    """Of one input's activation."""
    input_shape: tuple[int, ...]
    """Of one input, (3, H, W) or (2, T)."""
    output: Any
    """What `module` returns, with one `Hole` in it: a tensor, or containers around one."""
    skipped: tuple[tuple[str, Any], ...] = ()
    """Modules that run before the cut only, and what they return."""
    overwritten: bool = False
    """Whether the rest of the network writes into the activation."""


def find_cuts(
    module: nn.Module, stages: Sequence[Stage], images: Tensor, wanted: Collection[int] | None = None
) -> dict[int, Cut]:
    """Index -> cut, ascending, for those of `wanted` (all when not given) that can be resumed; the last one,
    `len(stages)`, always can.

    `images` (N, 3, H, W) or texts (N, 2, T), N at least 3, are any; cuts hold for this H and W, or T. On a copy of the network and other images
    each cut is tried in eval mode, and with all before it in eval mode and the rest in train mode: resumed from what the
    first emits, both must give the network's own output to the bit. `module` is left as it is. Raises BackboneError where
    the network refuses the images.
    """
    assert len(images) >= 3, "one more image than batch norm needs, so that cuts are tried at another batch size"
    recording = record(module, images)
    module_stage = module_stages(module, recording, stages)
    options = {
        index: _options(module, recording, lone, index, images)
        for index, lone in enumerate(lone_activations(recording, stages), start=1)
        if wanted is None or index in wanted
    }
    twin = copy.deepcopy(module).eval()
    others = images[1:].flip(-1)
    cuts = {}
    with _as_trials_run(others.device):
        given = _caught(twin, {cut.module for candidates in options.values() for cut in candidates}, others)
        output = twin(others)
        for index, candidates in options.items():
            frozen = {name for name, stage in module_stage.items() if stage < index}
            tried = (_tried(twin, cut, given[cut.module], others, output, frozen) for cut in candidates)
            if cut := next(filter(None, tried), None):
                cuts[index] = cut
    shape = tuple(recording.output.shape[1:])
    cuts[len(stages)] = Cut(len(stages), "", shape, tuple(images.shape[1:]), Hole(shape, False))
    return cuts


def cuts_at(backbone: Backbone, size: int, indices: Iterable[int]) -> dict[int, Cut]:
    """Index -> cut, ascending, for those of `indices` that a backbone can be resumed from with inputs of this size. Each is tried once per process; to ask for many together spares what they have in common, to leave others out
    their trials, which take a large network long."""
    known, indices = _known(backbone, size), sorted(indices)
    if new := set(indices) - known.keys():
        found = find_cuts(backbone.module, backbone.stages, _noise(backbone, size), new)
        known.update({index: found.get(index) for index in new})
    return {index: cut for index in indices if (cut := known[index])}


def cut_at(backbone: Backbone, size: int, index: int) -> Cut | None:
    """One of `cuts_at`; None where the backbone cannot be resumed there."""
    return cuts_at(backbone, size, (index,)).get(index)


def cuts_of(backbone: Backbone, size: int) -> dict[int, Cut]:
    """All of `cuts_at`."""
    return cuts_at(backbone, size, range(1, len(backbone.stages) + 1))


@lru_cache(maxsize=4)
def _known(backbone: Backbone, size: int) -> dict[int, Cut | None]:
    """What has been tried so far: None is a cut that failed."""
    return {}


def _noise(backbone: Backbone, size: int) -> Tensor:
    noise, like = backbone.inputs.noise(3, size), next(backbone.module.parameters())
    return noise.to(like) if noise.is_floating_point() else noise.to(like.device)


@torch.no_grad()
def emit(module: nn.Module, cuts: Iterable[Cut], images: Tensor) -> dict[int, Tensor]:
    """Index -> activation (N, *shape) of `images` (N, 3, H, W) at each cut, from one pass that ends at the deepest one.

    What lies before the cuts must be in eval mode. Activations are copies, without gradients, in the dtype and the memory
    layout that the network gives them.
    """
    wanted = sorted(cuts, key=lambda cut: cut.index)
    caught = _caught(module, {cut.module for cut in wanted}, images)
    return {cut.index: caught[cut.module] for cut in wanted}


def resume(module: nn.Module, cut: Cut) -> contextlib.ExitStack:
    """Make `module` the rest of itself, in place: it now takes activations (N, *shape) at the cut instead of images.

    Activations in the dtype that `emit` gave yield the numbers of the whole network. Gradients reach all that lies after
    the cut; names of parameters and buffers stay; modules before the cut do not run. Closing what is returned undoes it.
    """
    rest = _Rest(Hole(cut.input_shape, False), cut.overwritten)
    with contextlib.ExitStack() as undo:
        undo.callback(module.register_forward_pre_hook(rest.enter).remove)
        undo.callback(module.register_forward_hook(rest.leave).remove)
        for name, output in (*cut.skipped, (cut.module, cut.output)):
            part = module.get_submodule(name)
            assert "forward" not in vars(part), f"{name} has a forward of its own already"
            part.forward = _Stopgap(rest, output, gives=name == cut.module)
            undo.callback(delattr, part, "forward")
        return undo.pop_all()


def leave_at(module: nn.Module, cut: Cut, pool: Pooling, dtype: torch.dtype | None = None) -> None:
    """Make `module` end at the cut, in place: it now returns the activation there, pooled, (N, D); rounded
    to `dtype` where that is given. What comes after the cut does not run. Do it before `resume`."""
    if cut.module:
        assert "forward" not in vars(module), "the network has a forward of its own already"
        module.forward = _Trunk(module.forward, module.get_submodule(cut.module), pool, dtype)


def run_on(module: nn.Module) -> None:
    """Let a network that ends at a cut run to its own end, in vain: a tracer cannot be left in the middle, and drops the rest."""
    trunk = vars(module).get("forward")
    if isinstance(trunk, _Trunk):
        trunk.runs_on = True


def pooled_cut(cut: Cut) -> Cut:
    """From where a network that was made to end at `cut` is resumed with what it returns: it does nothing more."""
    shape = (pooled_width(cut.shape),)
    return Cut(cut.index, "", shape, cut.input_shape, Hole(shape, False))


def round_at(module: nn.Module, cut: Cut, dtype: torch.dtype) -> None:
    """Round the activation at the cut to `dtype`, and widen it again, in place, in every pass from now on."""
    module.get_submodule(cut.module).register_forward_hook(_Rounding(dtype))


def widened(activations: Tensor) -> Tensor:
    """In float32, or float64 where it is that already: what the rest of a network is given, whatever the store keeps."""
    return activations.to(torch.promote_types(activations.dtype, torch.float32))


@dataclass(eq=False)
class _Rest:
    """What the changed parts of one resumed network share."""

    images: Hole
    overwritten: bool
    activation: Tensor | None = None
    """The one it was given; None between passes."""

    def enter(self, _: nn.Module, args: tuple[Tensor]) -> Tensor:
        (self.activation,) = args
        return self.placeholder(self.images)

    def leave(self, *_: object) -> None:
        self.activation = None

    def given(self) -> Tensor:
        assert self.activation is not None, "a part of a resumed network runs outside it"
        return self.activation.clone() if self.overwritten else self.activation

    def placeholder(self, hole: Hole) -> Tensor:
        """Zeros, which take no memory where nothing writes into them."""
        assert self.activation is not None, "a part of a resumed network runs outside it"
        shape = (len(self.activation), *hole.shape)
        return self.activation.new_zeros(shape if hole.overwritten else ()).expand(shape)


@dataclass(eq=False)
class _Stopgap:
    """The `forward` of a module that does not run in a resumed network."""

    rest: _Rest
    output: Any
    gives: bool
    """Whether it returns the given activation."""

    def __call__(self, *_: object, **__: object) -> Any:
        def fill(hole: Hole) -> Tensor:
            return self.rest.given() if self.gives else self.rest.placeholder(hole)

        return tree_map_only(Hole, fill, self.output)


@dataclass(eq=False)
class _Trunk:
    """The `forward` of a network that ends at a module of its own."""

    whole: Callable[[Tensor], Tensor]
    last: nn.Module
    pool: Pooling
    dtype: torch.dtype | None
    runs_on: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def catch(_: nn.Module, __: Any, output: Any) -> None:
            caught.extend(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            if not self.runs_on:
                raise _AllCaught

        hook = self.last.register_forward_hook(catch)
        try:
            with contextlib.suppress(_AllCaught):
                self.whole(images)
        finally:
            hook.remove()
        (activation,) = caught
        features = self.pool(widened(activation))
        return features if self.dtype is None else widened(features.to(self.dtype))


@dataclass(frozen=True)
class _Rounding:
    dtype: torch.dtype

    def __call__(self, _: nn.Module, __: Any, output: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: widened(tensor.to(self.dtype)), output)


class _AllCaught(Exception):  # noqa: N818 (the way out of a forward pass, no error)
    pass


def _caught(module: nn.Module, names: Collection[str], images: Tensor) -> dict[str, Tensor]:
    """Module -> copy of the one tensor that it returns, from a pass that ends when all `names` have returned."""
    caught: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name in names:

            def catch(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                (activation,) = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
                caught[name] = activation.clone()
                if len(caught) == len(names):
                    raise _AllCaught

            stack.callback(module.get_submodule(name).register_forward_hook(catch).remove)
        if names:
            with contextlib.suppress(_AllCaught):
                module(images)
    assert len(caught) == len(names), f"did not run: {set(names) - caught.keys()}"
    return caught


def _options(
    module: nn.Module, recording: Recording, lone: Mapping[int, Value], index: int, images: Tensor
) -> list[Cut]:
    """Cuts where a module that runs once returns an activation that is `lone`: the smallest first, of these the latest."""
    activations = {value for call in recording.calls for value in call.writes}
    overwritten = {value: index for index, call in enumerate(recording.calls) for value in call.overwrites}
    runs: dict[str, list[int]] = defaultdict(list)
    for number, visit in enumerate(recording.visits):
        runs[visit.module].append(number)

    def outline(visit: Visit) -> Any:
        """What was returned, with holes; None unless its tensors are activations of the whole batch, all else plain."""
        leaves = tree_leaves(visit.output)
        made = [leaf for leaf in leaves if isinstance(leaf, Made)]
        plain = all(isinstance(leaf, Made | None | bool | int | float | str) for leaf in leaves)
        whole = made and all(leaf.value in activations and leaf.shape[:1] == images.shape[:1] for leaf in made)

        def hole(leaf: Made) -> Hole:
            return Hole(leaf.shape[1:], overwritten.get(leaf.value, 0) >= visit.end)

        return tree_map_only(Made, hole, visit.output) if plain and whole else None

    def returned(name: str, end: int) -> Any:
        """What a module returns, with holes, if that is the same whenever it runs and it runs before visit `end` only."""
        outlines = [outline(recording.visits[run]) if run < end else None for run in runs[name]]
        return outlines[0] if outlines and all(made == outlines[0] for made in outlines) else None

    def skipped(end: int) -> dict[str, Any]:
        """The outermost modules that run before visit `end` only, and what each returns."""
        name = recording.visits[end].module
        found: dict[str, Any] = {}
        for other, _ in module.named_modules():
            inside = any(other.startswith(f"{above}.") for above in (name, *found))
            around = not other or name.startswith(f"{other}.")
            if not inside and not around and (output := returned(other, end)) is not None:
                found[other] = output
        return found

    cuts = []
    for number, visit in reversed([*enumerate(recording.visits)]):
        output = outline(visit)
        values = [leaf.value for leaf in tree_leaves(visit.output) if isinstance(leaf, Made)]
        if visit.end in lone and values == [lone[visit.end]] and output is not None and runs[visit.module] == [number]:
            (hole,) = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Hole))
            replaced = tuple(skipped(number).items())
            cuts.append(Cut(index, visit.module, hole.shape, tuple(images.shape[1:]), output, replaced))
    return sorted(cuts, key=lambda cut: math.prod(cut.shape))


def _tried(
    twin: nn.Module, cut: Cut, given: Tensor, images: Tensor, output: Tensor, frozen: Iterable[str]
) -> Cut | None:
    """The cut, with `overwritten` as it was seen, if it holds; `output` is that of the whole network in eval mode."""
    buffers = [(buffer, buffer.clone()) for buffer in twin.buffers()]

    def run(inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        try:
            return twin(inputs)
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)

    overwritten = False
    try:
        for expected in (output, None):
            if expected is None:
                twin.train()
                for name in frozen:
                    twin.get_submodule(name).training = False
                expected = run(images)
            activation = given.clone()
            version = activation._version
            with resume(twin, cut):
                same = torch.equal(run(activation), expected)
            overwritten |= activation._version != version
            if not same:
                return None
    except REFUSALS:
        return None
    finally:
        twin.eval()
    return replace(cut, overwritten=overwritten)


@contextlib.contextmanager
def _as_trials_run(device: torch.device) -> Iterator[None]:
    """No gradients, no fused attention of another rounding, and a generator to draw from as one likes."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
