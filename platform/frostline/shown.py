"""Rows that are read and made whenever they are shown, for sets whose pixels no disk holds.

They are the rows that `pixels.load_rows` keeps, byte for byte, in whatever order they are asked for. Where it is known what will be
asked for, threads read and make it a little ahead, so that arithmetic does not wait for storage.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np

from frostline.files import DataError
from frostline.pixels import Recipe
from frostline.samples import BadSample
from frostline.sources import Source

AHEAD = 256
"""Rows that are made before they are asked for, at most."""


class Shown:
    """(N, …) rows of the samples `at` of a source, whose content hashes to (N, 32) `hashes`."""

    def __init__(self, source: Source, at: np.ndarray, hashes: np.ndarray, recipe: Recipe) -> None:
        self.source, self.at, self.hashes, self.make = source, at, hashes, recipe.make
        self.shape, self.dtype = (len(at), *recipe.shape), recipe.dtype
        self.nbytes = 0
        """What is kept."""
        self._coming: deque[int] = deque()
        self._ahead: deque[tuple[int, Future[np.ndarray]]] = deque()

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, wanted: np.ndarray) -> np.ndarray:
        """(B, …) rows of these numbers. Raises DataError where a sample is not what it was, or cannot be read any more."""
        rows = [self._take(number) for number in wanted.tolist()]
        self._begin()
        return np.stack([row.result() for row in rows])

    def expect(self, wanted: np.ndarray) -> None:
        """These rows will be asked for next, in this order; what was expected before will not."""
        while self._ahead:
            self._ahead.popleft()[1].cancel()
        self._coming = deque(wanted.tolist())
        self._begin()

    def _take(self, number: int) -> Future[np.ndarray]:
        place = next((place for place, (other, _) in enumerate(self._ahead) if other == number), None)
        if place is None:
            return self._threads.submit(self._row, number)
        for _ in range(place):  # somebody else was shown these
            self._ahead.popleft()[1].cancel()
        return self._ahead.popleft()[1]

    def _begin(self) -> None:
        while self._coming and len(self._ahead) < AHEAD:
            number = self._coming.popleft()
            self._ahead.append((number, self._threads.submit(self._row, number)))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count() or 1, "frostline-decode")

    def _row(self, number: int) -> np.ndarray:
        index = int(self.at[number])
        name = f"{self.source.name}: {self.source.sample_ids[index]}"
        try:
            (read,) = self.source.read([index])
            raw = read()
            if hashlib.sha256(raw).digest() != self.hashes[number].tobytes():
                raise DataError(
                    f"{name} is not what it was when the data was read first; start again once the data is at rest"
                )
            return self.make(raw)
        except BadSample as error:
            raise DataError(f"{name} cannot be read any more ({error}); put it back, and start again") from None
