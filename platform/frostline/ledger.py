"""Rows on their way into a study's tables: kept until they are committed, every 2 s or 256 finished trials."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from frostline import results
from frostline.commit import commit_part, committed_parts, next_part

COMMIT_ROWS = 256
COMMIT_SECONDS = 2.0


class Ledger:
    """The one writer of a study's rows. What is added goes into the tables with the next commit of trials."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.part = next_part(folder, results.RECORD)
        self.pending = _no_rows()
        self.sending: dict[str, list[dict[str, Any]]] | None = None
        self.committed = time.monotonic()

    def add(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep rows of a table."""
        self.pending[table] += map(dict, rows)

    def commit_if_due(self) -> None:
        """Commit if a trial waits and 2 s have passed since the last commit, or if 256 wait."""
        rows = len(self.pending[results.RECORD]) + (len(self.sending[results.RECORD]) if self.sending else 0)
        if rows and (rows >= COMMIT_ROWS or time.monotonic() - self.committed >= COMMIT_SECONDS):
            self.commit()

    def commit(self) -> None:
        """Commit finished trials, and all that was added with them, as one part.

        Rows that a failed commit was sending are sent again, unless it had failed after they were in place.
        """
        if self.sending is None:
            if not self.pending[results.RECORD]:
                return
            self.sending, self.pending = self.pending, _no_rows()
        elif self.part in committed_parts(self.folder, results.RECORD):
            self._sent()
            self.commit()
            return
        tables = {name: results.table_of(name, rows) for name, rows in self.sending.items() if rows}
        commit_part(self.folder, tables, self.part)
        self._sent()

    def close(self) -> None:
        """Commit what is left."""
        while self.sending or self.pending[results.RECORD]:
            self.commit()

    def _sent(self) -> None:
        self.part += 1
        self.sending = None
        self.committed = time.monotonic()


def _no_rows() -> dict[str, list[dict[str, Any]]]:
    return {name: [] for name in results.TABLES}
