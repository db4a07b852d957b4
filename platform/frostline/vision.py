"""torchvision and timm, imported without PyTorch's compiler, which takes a third of the time that a worker needs to be ready.

Both want one function each of `torch._dynamo` when they are imported: torchvision to ask, when boxes are pooled, whether a device can
compile; timm to keep the compiler off a few of its own. While they are imported, a module stands in for the compiler whose two
functions do the same once they are called. Where it is there already, or they want more of it, it is imported as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch._compile import _disable_dynamo

COMPILER, UTILS = "torch._dynamo", "torch._dynamo.utils"


def _can_compile(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device_type)


@contextmanager
def _compiler_later() -> Iterator[None]:
    if COMPILER in sys.modules:
        yield
        return
    compiler, utils = ModuleType(COMPILER), ModuleType(UTILS)
    vars(compiler).update(__path__=[], utils=utils, disable=lambda fn, recursive, **_: _disable_dynamo(fn, recursive))
    vars(utils).update(is_compile_supported=_can_compile)
    sys.modules |= {COMPILER: compiler, UTILS: utils}
    try:
        yield
    finally:
        del sys.modules[COMPILER], sys.modules[UTILS]


try:
    with _compiler_later():
        import timm
        import torchvision
except (ImportError, AttributeError):  # they want more of it
    import timm
    import torchvision

__all__ = ["timm", "torchvision"]
