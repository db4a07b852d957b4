"""Where a trial runs: its device, threads and node, what they are, and how much memory it took there."""

from __future__ import annotations

import functools
import math
import os
import platform
import resource
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from frostline.spec import Resources

MIB = 1 << 20


@dataclass(frozen=True)
class World:
    """What of its surroundings a trial sees."""

    device: torch.device
    node: str
    rank: int = 0
    """Of this worker among those that train the network together."""
    workers: int = 1
    sharded: bool = False
    """Whether each of them has a part of the parameters only."""

    @staticmethod
    def here(resources: Resources, *, rank: int = 0, workers: int = 1, sharded: bool = False) -> World:
        """This process, with its threads set to what the job says. Raises ValueError where the device is not there."""
        torch.backends.mha.set_fastpath_enabled(False)  # it differs from the trained path in the last bits
        if torch.get_num_threads() != resources.threads:
            torch.set_num_threads(resources.threads)
        return World(find_device(resources.device), socket.gethostname(), rank, workers, sharded)


CPU = torch.device("cpu")
ALONE = World(CPU, "")
"""For code that trains by itself: one worker."""


def find_device(wanted: str) -> torch.device:
    """The device that `resources.device` names; `auto` is cuda, then mps, then cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, available in there.items() if available)
    if not there[wanted]:
        raise ValueError(f"resources.device = {wanted!r}: PyTorch sees no such device here; use 'auto' or 'cpu'")
    return torch.device(wanted)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of the forward pass under `train.precision`, None for plain float32."""
    if precision == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else None
        )
    return torch.bfloat16 if precision == "bf16" else None


def mixed(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """A context in which forward passes use `dtype` where that is safe; None for plain float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def hardware(device: torch.device) -> str:
    """What the device is, for the rows."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()} ({os.cpu_count()} cores)"


@functools.cache
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def gpus_of_a_trial(resources: Resources, there: float) -> float:
    """GPUs to reserve for a trial: what the job says, else one where there are any that it may use."""
    if resources.gpus is not None:
        return resources.gpus
    return float(there >= 1 and resources.device in ("auto", "cuda"))


def trials_at_once(cpus: float, gpus: float, has_cpus: float, has_gpus: float) -> int:
    """How many trials of this many CPUs and GPUs one node holds."""
    return int(min(has_cpus / cpus, has_gpus / gpus if gpus else math.inf))


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak_mib(device: torch.device) -> float:
    """Peak memory since `reset_peak` in MiB: of the allocator on a GPU, else resident memory of this process (outside
    Linux since the process began)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
