"""A command's process ends as any other does, but at once."""

import subprocess
import sys


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_what_is_to_run_at_the_end_runs_and_what_was_printed_is_there() -> None:
    found = ended(
        "import atexit, sys\nfrom frostline.ending import leave\n"
        "atexit.register(print, 'last')\nprint('first', end=' ')\nprint('told', file=sys.stderr)\nleave(3)"
    )
    assert (found.returncode, found.stdout, found.stderr) == (3, "first last\n", "told\n")


def test_a_thread_that_works_is_waited_for() -> None:
    found = ended(
        "import threading, time\nfrom frostline.ending import leave\n"
        "threading.Thread(target=lambda: (time.sleep(0.5), print('done'))).start()\nleave(0)"
    )
    assert (found.returncode, found.stdout) == (0, "done\n")


def test_the_interpreter_is_not_taken_apart() -> None:
    found = ended(
        "import sys\nfrom frostline.ending import leave\n"
        "class Late:\n    def __del__(self):\n        print('late')\n"
        "sys.kept = Late()\nleave(0)"
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_the_command_ends_so() -> None:
    for module in ("frostline", "frostline.cli"):
        found = subprocess.run([sys.executable, "-m", module, "results", "nowhere"], capture_output=True, text=True)
        assert found.returncode == 2
        assert found.stderr.startswith("frostline: nowhere is not a study")
