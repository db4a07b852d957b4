"""A network's backbone as one program, by torch.compile."""

from __future__ import annotations

import torch
from torch import nn

from frostline.freeze import Network


def compiled(network: Network) -> Network:
    """What to call in place of `network` in training steps. It has the same tensors, under other names: whatever asks for names,
    hashes or states asks `network`. Raises ValueError where PyTorch lacks a compiler.

    Each shape of a batch has a program of its own, so that what a step computes does not depend on the steps before it, and random
    numbers are drawn as they are without. The head, whose dropout has a stream of its own, stays as it is.
    """
    if next(network.backbone.parameters()).device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # takes a moment, for those only who compile
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ValueError(
                "train.compile = true: torch.compile needs a C++ compiler on a CPU, and there is none here: install g++ (or let CXX "
                "name one), or set train.compile = false"
            ) from None
    torch.compiler.reset()  # of networks before this one, which would count against the number of programs that are kept
    program = torch.compile(network.backbone, dynamic=False, options={"fallback_random": True})
    assert isinstance(program, nn.Module)
    return Network(program, network.head)
