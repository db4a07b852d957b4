"""PyTorch's compiler is not imported before it is needed, and is whole when it is."""

from __future__ import annotations

import json
import subprocess
import sys

LOOK = """
import json, sys
import {module}
early = sorted(name for name in sys.modules if name.startswith(("torch._dynamo", "torch.distributed.fsdp")))
from torchvision.ops import roi_align
import timm, torch
from timm.models.naflexvit import NaFlexRopeIterator
pooled = roi_align(torch.ones(1, 3, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4]]), 2, aligned=True)
kept_off = NaFlexRopeIterator.__next__.__wrapped__.__name__
doubled = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2))
print(json.dumps([early, list(pooled.shape), kept_off, doubled.tolist(), torch._dynamo.__file__ is not None]))
"""


def said(module: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(module=module)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_worker_is_ready_without_the_compiler_which_is_whole_when_it_is_asked_for() -> None:
    assert said("frostline.worker") == [[], [1, 3, 2, 2], "__next__", [2.0, 2.0], True]


def test_where_the_compiler_is_there_already_it_stays() -> None:
    early, *others = said("torch._dynamo, frostline.worker")
    assert "torch._dynamo.utils" in early
    assert others == [[1, 3, 2, 2], "__next__", [2.0, 2.0], True]
