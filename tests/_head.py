"""A Ray head of our own on loopback, with dashboard and token, for tests that submit to it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

TOKEN = "f" * 64


@dataclass(frozen=True)
class Head:
    """Where it is, and what a process needs to be let in."""

    address: str
    """As for ray.init."""
    dashboard: str
    env: dict[str, str]
    """With the right token."""

    def run(self, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        """The command line in a folder, with its output as one text."""
        command = [sys.executable, "-m", "frostline.cli", *arguments]
        return subprocess.run(
            command, cwd=folder, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@contextmanager
def ray_head(root: Path, *, nodes: int = 1, host: str = "127.0.0.1", token: bool = True) -> Iterator[Head]:
    """A head with 2 CPUs and no GPU, and other such nodes beside it, killed by process tree afterwards. They have a broken
    `frostline` on their path: only that which a job brings can be used there. Without `token` it lets in whoever reaches it."""
    (root / "token").write_text(TOKEN)
    (root / "token").chmod(0o600)
    (root / "home").mkdir()
    (root / "broken" / "frostline").mkdir(parents=True)
    (root / "broken" / "frostline" / "__init__.py").write_text("raise ImportError('the one of this node')\n")
    home = {"HOME": str(root / "home"), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(root / "token")}
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | home
    gcs, dashboard, client, *agents = free_ports(3 + nodes)
    temp = Path(f"/tmp/frostline-{os.getpid()}-{gcs}")  # a socket's path is short
    own = ["--head", f"--port={gcs}", f"--ray-client-server-port={client}", f"--temp-dir={temp}"]
    own += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--node-ip-address={host}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    its = env | {"PATH": path, "PYTHONPATH": str(root / "broken"), "RAY_USAGE_STATS_ENABLED": "0"}
    its |= {} if token else {"RAY_AUTH_MODE": "disabled"}
    started: list[subprocess.Popen] = []
    try:
        for agent in agents:
            started.append(_start(root, its, *own, f"--dashboard-agent-listen-port={agent}"))
            own = [f"--address={host}:{gcs}"]
        yield Head(f"{host}:{gcs}", f"http://127.0.0.1:{dashboard}", env)
    finally:
        for process in started:
            end(process)
        shutil.rmtree(temp, ignore_errors=True)


def _start(root: Path, env: dict[str, str], *options: str) -> subprocess.Popen:
    """A node of Ray, when it is there."""
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--num-cpus=2",
        "--num-gpus=0",
        *options,
    ]
    node = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)
    assert node.stdout
    said = ""
    while "runtime started" not in said:
        line = node.stdout.readline()
        assert line, f"the node has died: {said}"
        said += line
    return node


def end(process: subprocess.Popen) -> None:
    """Kill a process that we have started, and all that it has."""
    tree: list[psutil.Process] = []
    if process.poll() is None:
        tree = psutil.Process(process.pid).children(recursive=True)
    for each in [*tree, process]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=30)
    process.communicate()


def free_ports(count: int) -> list[int]:
    """TCP ports that nothing listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
