"""What one machine says of itself, as plain facts: packages, devices, network, disks. No Ray, no torch in this process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from frostline.rayenv import shared_token, token_place
from frostline.versions import versions

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_DEVICES = """
import json, torch
names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
print(json.dumps(names or ["mps"] * torch.backends.mps.is_available()))
"""


def look(node: str, address: str | None = None, temp: str | None = None, storage: str | None = None) -> dict[str, Any]:
    """The facts of this machine, as JSON values: `node` is what to call it, `address` its IP in the cluster (else that of the
    route outwards), `temp` Ray's temporary folder there, `storage` a folder that a study would lie in."""
    host = socket.gethostname()
    began = time.perf_counter()
    host_address = _resolved(host)
    look_up_s = time.perf_counter() - began
    return {
        "node": node,
        "versions": versions(),
        "cpus": os.cpu_count(),
        **_devices(),
        "auth": os.environ.get("RAY_AUTH_MODE"),
        "token": token_place(),
        "token_shared": shared_token(),
        "sockets": ray_sockets(),
        "host": host,
        "host_address": host_address,
        "look_up_s": look_up_s,
        "address": address or _outward_address(),
        "interfaces": _interfaces(),
        "variables": {name: os.environ.get(name) for name in INTERFACE_VARIABLES},
        "temp": _disk(temp or tempfile.gettempdir()),
        "storage": _disk(storage) if storage else None,
    }


def interface_settings(address: str) -> dict[str, str]:
    """What tells gloo and NCCL which interface carries the node's address, where its host name, which they go by, does not and
    nothing else has told them."""
    carrier = next((name for name, ip in _interfaces().items() if ip == address), None)
    if carrier is None or _resolved(socket.gethostname()) == address:
        return {}
    return {name: carrier for name in INTERFACE_VARIABLES if name not in os.environ}


def put(folder: str) -> str:
    """Write a file of a new name and content into a folder, or into the nearest one above it that is there; answers its path."""
    path = _nearest(Path(folder)) / f".frostline-doctor-{uuid.uuid4().hex}"
    path.write_text(path.name)
    return str(path)


def got(path: str, patience_s: float = 5.0) -> bool:
    """Whether this machine reads what `put` has written; network file systems are given some seconds."""
    file, until = Path(path), time.monotonic() + patience_s
    while not (file.is_file() and file.read_text() == file.name):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def drop(path: str) -> None:
    """Delete what `put` has written."""
    Path(path).unlink()


def clock() -> float:
    """Seconds since 1970, by this machine."""
    return time.time()


def dashboard(url: str, *, here: bool = False) -> dict[str, Any] | None:
    """Whether a Ray dashboard that answers at a URL wants a token, and whether it is bound to loopback only; None where none
    answers. With `here` the port's listeners on this machine say how it is bound, else the URL."""
    try:
        with _DIRECTLY.open(f"{url}/api/version", timeout=10) as answer:  # without any token
            body = answer.read(10_000)
        if b"ray_version" not in body:
            return None
        wants_token = False
    except urllib.error.HTTPError as error:
        error.close()
        if error.code not in (401, 403):
            return None
        wants_token = True
    except OSError:
        return None
    host, _, port = url.partition("://")[2].rpartition(":")
    loopback = not listens_publicly(int(port)) if here else host in ("127.0.0.1", "localhost", "[::1]")
    return {"url": url, "token": wants_token, "loopback": loopback}


def _devices() -> dict[str, Any]:
    """GPUs by name, as torch sees them in a process that Ray has hidden none from, or why torch cannot be imported."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, text=True, env=env)
    if done.returncode:
        return {"devices": [], "torch_error": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    return {"devices": json.loads(done.stdout.splitlines()[-1]), "torch_error": None}


def _resolved(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _outward_address() -> str:
    """The IPv4 address of the interface that leads out; loopback where none does. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # of a block for documentation
            return sock.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _interfaces() -> dict[str, str]:
    """Network interface -> its IPv4 address; empty outside Linux."""
    if sys.platform != "linux":
        return {}
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue  # it has none
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def listens_publicly(port: int) -> bool:
    """Whether a socket of this machine listens at a TCP port on more than loopback; outside Linux it is taken to."""
    return not _tables() or port in _public_sockets().values()


def ray_sockets() -> dict[str, list[int]]:
    """TCP ports at which Ray's processes here listen on more than loopback, by process; empty outside Linux, and without those of
    other users."""
    public, found = _public_sockets(), dict[str, set[int]]()
    for process in Path("/proc").glob("[0-9]*") if public else ():
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")[:4]
            name = next(
                (Path(word).name for word in words if "-packages/ray/" in word or word.startswith("ray::")), None
            )
            for held in (process / "fd").iterdir() if name else ():
                if (port := public.get(str(held.readlink()))) and name:
                    found.setdefault(name, set()).add(port)
        except OSError:  # it has ended, or is another user's
            continue
    return {name: sorted(found[name]) for name in sorted(found)}


def _public_sockets() -> dict[str, int]:
    """What listens at a TCP port on more than loopback, as a process's folder of descriptors names it."""
    found = {}
    for table in _tables():
        for line in table.read_text().splitlines()[1:]:
            words = line.split()
            address, _, port = words[1].partition(":")
            mapped = len(address) == 8 or address.startswith("0" * 16 + "FFFF0000")  # IPv4, also in the table of IPv6
            loopback = address.endswith("7F") if mapped else address == "0" * 24 + "01000000"
            if words[3] == "0A" and not loopback:
                found[f"socket:[{words[9]}]"] = int(port, 16)
    return found


def _tables() -> list[Path]:
    return [path for name in ("tcp", "tcp6") if (path := Path("/proc/net", name)).exists()]


def _disk(folder: str) -> dict[str, Any]:
    nearest = _nearest(Path(folder))
    usage = shutil.disk_usage(nearest)
    return {"path": folder, "there": str(nearest), "free_bytes": usage.free, "total_bytes": usage.total}


def _nearest(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
