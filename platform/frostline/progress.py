"""How a study goes on, for people: a live panel in a terminal, a line now and then in a log."""

from __future__ import annotations

import threading
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from frostline.finalists import Finished
from frostline.snapshot import Snapshot, Training

LINE_SECONDS = 10.0


class Progress:
    """Shows snapshots; a context manager. Safe to call from any thread."""

    def __init__(self, console: Console, every_s: float = LINE_SECONDS) -> None:
        self.console, self.every_s = console, every_s
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self.lock = threading.Lock()
        self.started, self.shown_at = time.monotonic(), float("-inf")
        self.shown: tuple[int, ...] | None = None
        self.warned: str | None = None

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Draw a snapshot; in a log, at most a line every `every_s` seconds and only when something has changed."""
        with self.lock:
            if snapshot.trouble != self.warned:
                self.warned = snapshot.trouble
                self.console.print(Text(f"warning: {snapshot.trouble}", style="yellow"), soft_wrap=True)
            if self.live:
                self.live.update(panel(snapshot))
                return
            epochs = sum(record.epoch for each in snapshot.training for record in each.latest)
            state = (snapshot.done, snapshot.confirmed, snapshot.running, snapshot.extracted, epochs)
            ended = snapshot.done == snapshot.total and snapshot.confirmed >= snapshot.to_confirm
            if state != self.shown and (ended or time.monotonic() - self.shown_at >= self.every_s):
                self.shown, self.shown_at = state, time.monotonic()
                self.console.print(Text(line(snapshot)), soft_wrap=True)

    def decoding(self, done: int, total: int) -> None:
        """Show how many inputs have been read."""
        self.tell(f"reading the data: {done:,} of {total:,}")

    def tell(self, text: str) -> None:
        """Show what is being done; in a log, at most every `every_s` seconds."""
        with self.lock:
            if self.live:
                self.live.update(Text(text))
            elif time.monotonic() - max(self.shown_at, self.started) >= self.every_s:
                self.shown_at = time.monotonic()
                self.console.print(Text(text), soft_wrap=True)


def line(snapshot: Snapshot) -> str:
    """A snapshot as one line of plain text."""
    parts = [
        f"[{duration(snapshot.elapsed_s)}]",
        *([f"{snapshot.done}/{snapshot.total} trials"] if snapshot.total else []),
        f"{snapshot.running} running",
        *([f"{snapshot.pruned} pruned"] if snapshot.total else []),
        f"{snapshot.failed} failed",
        *(epochs(each) for each in snapshot.training),
    ]
    if snapshot.extracted < snapshot.to_extract:
        parts.append(extraction(snapshot))
    if snapshot.to_confirm:
        what = "confirmed" if snapshot.total else "trained"
        parts.append(f"{snapshot.confirmed}/{snapshot.to_confirm} {what}")
    if snapshot.best:
        parts.append(f"best {score(snapshot.best)}")
    if snapshot.left_s is not None and snapshot.left_s > 0:
        parts.append(f"about {duration(snapshot.left_s)} left")
    return "  ".join(parts)


def panel(snapshot: Snapshot) -> Group:
    """A snapshot as a few live lines."""
    counts = Table.grid(padding=(0, 2))
    begun = sum(record.epoch / each.epochs for each in snapshot.training for record in each.latest)
    bar = ProgressBar(
        total=snapshot.total + snapshot.to_confirm, completed=snapshot.done + snapshot.confirmed + begun, width=40
    )
    left = f"about {duration(snapshot.left_s)} left" if snapshot.left_s is not None else "starting"
    counts.add_row(bar, Text(duration(snapshot.elapsed_s)), Text(left))
    if snapshot.total:
        state = (
            f"{snapshot.done} of {snapshot.total} trials, {snapshot.running} running, {snapshot.pruned} pruned, "
            f"{snapshot.failed} failed; {snapshot.confirmed} of {snapshot.to_confirm} confirmations"
        )
    else:
        state = f"{snapshot.confirmed} of {snapshot.to_confirm} trained, {snapshot.running} running, {snapshot.failed} failed"
    lines = [Text(state), *(Text(epochs(each)) for each in snapshot.training)]
    if snapshot.extracted < snapshot.to_extract:
        lines.append(Text(extraction(snapshot)))
    if snapshot.best:
        lines.append(Text(f"best so far    {score(snapshot.best)}"))
    if snapshot.latest:
        lines.append(Text(f"last finished  {score(snapshot.latest)}", style="dim"))
    return Group(counts, *lines)


def epochs(training: Training) -> str:
    """How far a trial is, and how it does."""
    for record in training.latest:
        at = f"{training.trial_id} epoch {record.epoch}/{training.epochs}"
        return f"{at}, train loss {record.train_loss:.4f}, val {record.val_score:.4f}, {record.seconds:.1f} s an epoch"
    return f"{training.trial_id} starting"


def extraction(snapshot: Snapshot) -> str:
    """How far the samples are whose activations are being stored."""
    return f"{snapshot.extracted:,} of {snapshot.to_extract:,} samples through frozen stages"


def score(trial: Finished) -> str:
    """`0.9512 (freeze-00007)`, or how the trial ended where it has no score."""
    return f"{trial.score:.4f} ({trial.trial_id})" if trial.score is not None else f"{trial.trial_id} {trial.status}"


def duration(seconds: float) -> str:
    """`0:07`, `12:34` or `3:04:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
