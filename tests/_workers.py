"""Several workers on this machine, joined by gloo and without Ray: processes forked from one that has imported PyTorch."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from frostline.world import World

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["_workers", "frostline.trial", "torch._dynamo", "torch.distributed.fsdp"])


def together(workers: int, work: Callable[..., Any], *arguments: Any, sharded: bool = False) -> list[Any]:
    """What `work(world, *arguments)`, a function of a module, answers on each of so many workers, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for rank in range(workers):
            mine, other = CONTEXT.Pipe()
            world = World(torch.device("cpu"), f"node{rank}", rank, workers, sharded)
            process = CONTEXT.Process(target=_run, args=(other, folder, world, work, arguments))
            process.start()
            other.close()
            found.append((process, mine))
        answers = [pickle.loads(mine.recv_bytes()) for _, mine in found]
        for process, _ in found:
            process.join(60)
    problems = [answer for answer, sound in answers if not sound]
    assert not problems, "\n".join(problems)
    return [answer for answer, _ in answers]


def _run(mine: Connection, folder: str, world: World, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(seconds=300), rank=world.rank, world_size=world.workers
    )
    try:
        answer = work(world, *arguments), True
    except BaseException:  # noqa: BLE001 (it is told to the test)
        answer = traceback.format_exc(), False
    mine.send_bytes(pickle.dumps(answer))  # `send` would share tensors with a process that ends
    dist.destroy_process_group()
