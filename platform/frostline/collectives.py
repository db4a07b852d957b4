"""What the workers that train one network say to each other; one alone says nothing, and gets its own answer.

Every worker calls the same functions in the same order. Each has a share of every batch, and gradients are averaged over the
workers, so that a batch stays what the job says, however many work on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from frostline.world import World

if TYPE_CHECKING:  # else where a network is sharded: they take half a second to import
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def share(world: World, size: int) -> slice:
    """Which of `size` samples are this worker's: consecutive ones, as many as others have or one more; none where there are
    fewer than workers."""
    return slice(world.rank * size // world.workers, (world.rank + 1) * size // world.workers)


def replicated(world: World, network: nn.Module) -> nn.Module:
    """What to call in place of the network in training steps: it averages gradients over the workers (DDP). Made anew whenever
    other parameters train: those that began to train later would not be averaged."""
    if world.workers == 1 or world.sharded:
        return network
    devices = [world.device] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the setting's name is new, and older versions lack that
        return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)


def spanning_norms(world: World, backbone: nn.Module) -> nn.Module:
    """The backbone with norm layers whose batch statistics are those of the whole batch, of which each worker has a share. Raises
    ValueError on a CPU, where PyTorch has no such layers."""
    if world.workers == 1:
        return backbone
    if world.device.type != "cuda":
        raise ValueError(
            'freeze.norm = "batch" with scaling.workers > 1 takes statistics over all workers, which PyTorch does on GPUs only: '
            'use "frozen", "affine" or "recalibrate", or one worker'
        )
    from timm.layers.norm_act import convert_sync_batchnorm

    return convert_sync_batchnorm(backbone)


def shard(world: World, network: nn.Module) -> None:
    """Spread a network's parameters over the workers (FSDP2), and with each its gradients and moments; it goes on to be called as
    before. What repeats, such as the blocks of a transformer, is made whole one at a time, when it is passed. Nothing where
    the job asks for whole copies."""
    if not world.sharded:
        return
    from torch.distributed.fsdp import fully_shard

    network.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
    mesh = init_device_mesh(world.device.type, (world.workers,))
    for unit in [*_blocks(network), network]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of its outermost sequences that have members of their own."""
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (member for member in child if any(True for _ in member.children()))
        else:
            yield from _blocks(child)


def unsynchronised(model: nn.Module) -> AbstractContextManager[Any]:
    """Within the block gradients are summed up here, and not yet averaged: of all pieces of a batch but the last."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if _is_sharded(model):
        return _Unsynchronised(model)
    return nullcontext()


def _is_sharded(model: nn.Module) -> TypeGuard[FSDPModule]:
    return hasattr(model, "set_requires_gradient_sync")


class _Unsynchronised:
    def __init__(self, model: FSDPModule) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self.model.set_requires_gradient_sync(True)


def is_part(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the worker has only a part of it."""
    return hasattr(tensor, "device_mesh")


def full(tensor: Tensor) -> Tensor:
    """A tensor whole, where the worker has a part of it; then all must ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def lay(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one of which the worker has a part, or all."""
    if is_part(target):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    target.copy_(whole)


def total(world: World, value: Tensor) -> Tensor:
    """The sum of all workers' values."""
    if world.workers > 1:
        dist.all_reduce(value)
    return value


def gathered(world: World, value: T) -> list[T]:
    """Every worker's value, by rank."""
    if world.workers == 1:
        return [value]
    found: list[Any] = [None] * world.workers
    dist.all_gather_object(found, value)
    return found


def agreed(world: World, decide: Callable[..., T], *arguments: Any) -> T:
    """What the first worker decides; the others learn it."""
    found: list[Any] = [decide(*arguments) if world.rank == 0 else None]
    if world.workers > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]
