"""Items of many callers, worked on together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches(Generic[Item, Result]):
    """Whenever there is room for another call of `work` it is given all items that wait, up to `most`.

    Nothing waits for a batch to fill, so that a caller who is alone is answered at once, in a batch of its own; under load
    batches are as large as what has come in the meantime.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]], most: int, calls: int) -> None:
        """`work` answers a result an item; `calls` of it are under way at most."""
        self.work, self.most, self.room = work, most, calls
        self.waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self.tasks: set[asyncio.Task] = set()

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Their results, in order. What `work` raises is raised to all whose items were with it."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        self.waiting.extend(zip(items, futures, strict=True))
        self._start()
        return await asyncio.gather(*futures)

    def _start(self) -> None:
        while self.room and self.waiting:
            taken = [self.waiting.popleft() for _ in range(min(self.most, len(self.waiting)))]
            if taken := [(item, future) for item, future in taken if not future.done()]:  # else its caller has left
                self.room -= 1
                task = asyncio.create_task(self._work(taken))
                self.tasks.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        self.room += 1
        self._start()

    async def _work(self, taken: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self.work([item for item, _ in taken])
        except Exception as error:  # noqa: BLE001 (it is the callers')
            for _, future in taken:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(taken, results, strict=True):
            if not future.done():
                future.set_result(result)
