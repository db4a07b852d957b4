"""A running study's report, kept fresh by a process of its own: no trial and no commit waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EVERY_S = 60.0
"""Between two reports, at least, and before the first."""
SHARE = 0.05
"""Of one core's time, at most, which is also taken at the lowest priority."""


class Refresh:
    """Begins to write a report whenever one is due."""

    def __init__(self, study: Path) -> None:
        self.study = study
        self.writing: subprocess.Popen[bytes] | None = None
        self.began = time.monotonic()
        self.due = self.began + EVERY_S

    def look(self) -> None:
        """Begin the next one if it is due; this takes no time, and may be called as often as one likes."""
        now = time.monotonic()
        if self.writing and self.writing.poll() is not None:
            self.writing, self.due = None, after(self.began, now)
        if not self.writing and now >= self.due:
            command = [sys.executable, "-m", "frostline.refresh", str(self.study)]
            # What goes wrong is told when the last one is written. Ctrl-C is the search's to handle: hence a session of its own
            null = subprocess.DEVNULL
            self.writing = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
            self.began = now


def after(began: float, ended: float) -> float:
    """When the next report is due, after one that was begun and ended at these times."""
    return began + max(EVERY_S, (ended - began) / SHARE)


@contextmanager
def refreshing(study: Path) -> Iterator[Refresh]:
    """A Refresh of which no process is left at the end."""
    refresh = Refresh(study)
    try:
        yield refresh
    finally:
        if refresh.writing:
            refresh.writing.terminate()
            refresh.writing.wait()


if __name__ == "__main__":
    from frostline.commit import write_file
    from frostline.report import NAME, build

    os.nice(19)
    page = build(sys.argv[1])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is begun now is over in a moment, and leaves no half behind
    write_file(Path(sys.argv[1]) / NAME, page.encode())
