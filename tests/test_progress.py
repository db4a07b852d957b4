"""What people see while they wait."""

from __future__ import annotations

import io

from rich.console import Console

from frostline.finalists import Finished
from frostline.progress import Progress, duration, line, panel
from frostline.snapshot import Snapshot

BEST = Finished("freeze-00007", "freeze", 7, "search", "complete", 0.9512, 3.0)
PRUNED = Finished("freeze-00008", "freeze", 8, "search", "pruned", None, 1.0)


def snapshot(done: int = 12, **changes: object) -> Snapshot:
    fields = {
        "done": done, "running": 2, "total": 24, "pruned": 3, "failed": 0, "confirmed": 0, "confirmed_complete": 0,
        "to_confirm": 5, "best": BEST, "extracted": 64, "to_extract": 64, "elapsed_s": 42.4, "left_s": 80.0, "latest": PRUNED,
    }  # fmt: skip
    return Snapshot(**{**fields, **changes})


def test_a_line_says_all_that_matters() -> None:
    assert line(snapshot()) == (
        "[0:42]  12/24 trials  2 running  3 pruned  0 failed  0/5 confirmed  best 0.9512 (freeze-00007)  about 1:20 left"
    )
    assert "best" not in line(snapshot(best=None))
    assert "left" not in line(snapshot(left_s=None))


def test_while_activations_are_stored_the_images_are_counted() -> None:
    busy = snapshot(0, extracted=1024, to_extract=10_600)
    assert "1,024 of 10,600 samples through frozen stages" in line(busy)
    out = io.StringIO()
    Console(file=out, width=120).print(panel(busy))
    assert "1,024 of 10,600 samples through frozen stages" in out.getvalue()
    assert "images" not in line(snapshot())


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.2, 59.6, 3600, 7384)] == ["0:00", "1:00", "1:00:00", "2:03:04"]


def test_a_log_gets_a_line_when_something_changed_and_time_has_passed() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=200), every_s=0.0) as progress:
        progress.show(snapshot(1))
        progress.show(snapshot(1))
        progress.show(snapshot(2))
    assert [text.split()[1] for text in out.getvalue().splitlines()] == ["1/24", "2/24"]
    out = io.StringIO()
    with Progress(Console(file=out, width=40), every_s=1e9) as progress:
        for done in range(25):
            progress.show(snapshot(done, confirmed=5 if done == 24 else 0))
    lines = out.getvalue().splitlines()
    assert [text.split()[1] for text in lines] == ["0/24", "24/24"]
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_a_panel() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    console.print(panel(snapshot()))
    text = out.getvalue()
    assert "12 of 24 trials, 2 running, 3 pruned, 0 failed; 0 of 5 confirmations" in text
    assert "best so far    0.9512 (freeze-00007)" in text
    assert "last finished  freeze-00008 pruned" in text
    with Progress(console) as progress:
        progress.show(snapshot())
        progress.decoding(10, 20)
