"""Bundles that differ in their heads only: which of them do, and one pass through their backbone for all of their heads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from torch import nn

from frostline.bundle import Bundle
from frostline.models import digest
from frostline.weights import hash_tensors

Logits = dict[str, np.ndarray]
"""Name of a bundle -> (C,)."""


@dataclass(frozen=True, eq=False)
class Trunk:
    """A backbone, and the heads of all bundles that stand on it."""

    bundle: Bundle
    """One of them: its backbone is that of all."""
    heads: Mapping[str, nn.Module]
    """By the name of their bundle."""

    def logits(self, items: Sequence[tuple[np.ndarray, tuple[str, ...]]]) -> list[Logits]:
        """Of images, (size, size, 3) uint8, each with the names of the bundles that are asked, in one pass.

        Every head that any image asks for sees all of them: a head costs next to nothing, and a batch is then a batch to all.
        """
        names = [name for name in self.heads if any(name in wanted for _, wanted in items)]
        pixels = np.stack([image for image, _ in items])
        made, _ = self.bundle.pass_heads(pixels, [self.heads[name] for name in names], fill=False)
        rows = dict(zip(names, made, strict=True))
        return [{name: rows[name][number] for name in wanted} for number, (_, wanted) in enumerate(items)]


def trunk_of(bundles: Mapping[str, Bundle]) -> Trunk:
    """Of bundles with the same `trunk_id`."""
    return Trunk(next(iter(bundles.values())), {name: bundle.network.head for name, bundle in bundles.items()})


def trunk_id(bundle: Bundle) -> str:
    """16 hex digits over all that makes a bundle's features of an image's bytes, so that those of two bundles with the same one are
    the same to the bit: tensors as they are after training, where the network ends, rounding, precision, preprocessing."""
    spec = bundle.spec
    adapts = spec.config.freeze.strategy in ("lora", "dora")
    rounds = [bundle.plan.cut, bundle.plan.only_head, spec.features.dtype] if bundle.rounds else None
    return digest(
        [
            hash_tensors(bundle.network.backbone.state_dict().items()),
            [spec.backbone.name, bundle.about["stages_hash"], bundle.plan.end],
            spec.config.freeze.model_dump(mode="json") if adapts else None,
            [rounds, spec.config.train.precision, spec.resources.model_dump(mode="json")],
            [bundle.about["preprocessing"], spec.data.max_megapixels],
        ]
    )


class Batches:
    """Items of many callers, worked on together: whenever `work` is free it is given all that wait, up to `most`.

    Nothing waits for a batch to fill, so that a caller who is alone is answered at once, in a batch of its own.
    """

    def __init__(self, work: Callable[[Sequence], Sequence], most: int, thread: Executor) -> None:
        """`work` runs in `thread`, and answers a result an item."""
        self.work, self.most, self.thread = work, most, thread
        self.waiting: deque[tuple[object, asyncio.Future]] = deque()
        self.running: asyncio.Task | None = None

    async def __call__(self, items: Sequence) -> list:
        """Their results, in order. What `work` raises is raised to all whose items were with it."""
        futures = [asyncio.get_running_loop().create_future() for _ in items]
        self.waiting.extend(zip(items, futures, strict=True))
        if self.running is None:
            self.running = asyncio.create_task(self._run())
        return await asyncio.gather(*futures)

    async def _run(self) -> None:
        try:
            while self.waiting:
                taken = [self.waiting.popleft() for _ in range(min(self.most, len(self.waiting)))]
                taken = [(item, future) for item, future in taken if not future.done()]  # its caller has left
                if taken:
                    await self._pass(taken)
        finally:
            self.running = None

    async def _pass(self, taken: Sequence[tuple[object, asyncio.Future]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self.thread, self.work, [item for item, _ in taken])
        except Exception as error:  # noqa: BLE001 (it is the callers')
            for _, future in taken:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(taken, results, strict=True):
            if not future.done():
                future.set_result(result)
