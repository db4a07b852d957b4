"""A Ray cluster of several nodes on this host, for trying things out and for fault tests.

The head runs on the host and has no CPUs, so that searches are started from the host. As root on Linux every other node has a
network namespace of its own, with an address, a host name and a link that can be pulled; elsewhere nodes are raylets that
share the loopback address. All of it is in one state file, written before anything is made, so that `down` finds everything.
Ray itself is run, never imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Network
from pathlib import Path

from frostline import network
from frostline.cache import cache_root
from frostline.commit import write_file

HEAD = "head"
PORT = 6379
OBJECT_STORE_BYTES = 256 << 20
"""Of shared memory a node: what a study sends through it is small."""

START_SECONDS = 180
DEATH_SECONDS = 30
ASK = "import json, ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(json.dumps(ray.nodes()))"


class ClusterMistake(ValueError):  # noqa: N818 (it names whose mistake it is)
    """Something that cannot be done with the cluster there is; the text says what can."""


class NodeError(RuntimeError):
    """A node that did not start, or does not go; the text ends with what it said."""


@dataclass(frozen=True)
class Node:
    """A node as it was planned, and the process that runs it: 0 before it starts."""

    name: str
    address: str
    cpus: int
    namespace: str | None
    link: str | None
    pid: int = 0
    born: int = 0
    """When that process began, in clock ticks since the host did: a pid alone may have passed to another."""


@dataclass(frozen=True)
class Cluster:
    """All there is of a cluster. The head is the first node; `subnet` and `bridge` are None for raylets on loopback."""

    address: str
    folder: str
    subnet: str | None
    bridge: str | None
    lacking: str | None
    """Why nodes have no addresses of their own."""
    nodes: tuple[Node, ...]


def root() -> Path:
    """Where the state and the token are."""
    return cache_root() / "cluster"


def token_path() -> Path:
    return root() / "token"


def current() -> Cluster | None:
    """The cluster that is up, whole or half-made."""
    try:
        state = json.loads((root() / "state.json").read_bytes())
    except FileNotFoundError:
        return None
    return Cluster(**{**state, "nodes": tuple(Node(**node) for node in state["nodes"])})


def environment() -> dict[str, str]:
    """What a process needs in its environment, before it imports Ray, to be let in."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path())}


def up(nodes: int = 3, cpus: int | None = None, subnet: str | None = None) -> Cluster:
    """Start a head and `nodes` nodes of `cpus` CPUs (by default the host's, divided), and wait until all have joined.

    What was begun is taken down again when a node does not start. Raises ClusterMistake where a cluster is up already,
    network.SubnetError, network.NetworkError and NodeError.
    """
    planned = plan(nodes, cpus, subnet)
    _claim(planned)
    try:
        token_path().touch(0o600)
        token_path().write_text(secrets.token_hex(32))
        Path(planned.folder).mkdir(0o700)
        if planned.bridge:
            _wire(planned)
        head = _started(planned, planned.nodes[:1])
        joined = _started(head, head.nodes[1:])
        _wait_for(lambda: all(_registered(joined).get(node.name) for node in joined.nodes), "the nodes to join")
    except BaseException:
        down()
        raise
    return joined


def plan(nodes: int, cpus: int | None, subnet: str | None) -> Cluster:
    """What `up` would make here: names, addresses and a free port."""
    if not 1 <= nodes <= 200:
        raise ClusterMistake(f"--nodes {nodes}: give 1 to 200")
    if cpus is not None and cpus < 1:
        raise ClusterMistake(f"--cpus {cpus}: give 1 or more")
    each = cpus or max(1, (os.cpu_count() or 1) // nodes)
    lacking, key = network.missing(), secrets.token_hex(2)
    if lacking and subnet:
        raise network.SubnetError(f"--subnet {subnet}: nodes can have no addresses of their own here: {lacking}")
    net = None if lacking else network.free_subnet(subnet)
    host = "127.0.0.1" if net is None else str(net[1])
    members = [Node(HEAD, host, 0, None, None if net is None else f"fl-{key}")]
    for number in range(1, nodes + 1):
        name = f"node{number}"
        own = (
            (host, each, None, None)
            if net is None
            else (str(net[10 + number]), each, f"fl-{key}-{name}", f"fl-{key}-{number}")
        )
        members.append(Node(name, *own))
    folder = str(
        Path(tempfile.gettempdir()) / f"frostline-{key}"
    )  # Ray's sockets lie below: their paths may have 107 characters
    return Cluster(
        address=f"{host}:{_free_port(PORT)}",
        folder=folder,
        subnet=None if net is None else str(net),
        bridge=members[0].link,
        lacking=lacking,
        nodes=tuple(members),
    )


def down() -> Cluster | None:
    """Take down what is up, whole, half-made or half taken down, and answer what it was."""
    cluster = current()
    if cluster is None:
        return None
    for node in cluster.nodes:
        _end(node)
    for node in cluster.nodes:
        if node.namespace and node.link:
            network.remove_namespace(node.namespace, node.link)
    if cluster.bridge:
        network.remove_bridge(cluster.bridge)
    for folder in (Path(cluster.folder), root()):
        if folder.exists():
            shutil.rmtree(folder)
    return cluster


def states(cluster: Cluster) -> dict[str, str]:
    """Of every node whether it is `alive`, `dead` (its process has ended), `cut` (its link is down) or `lost` (it runs, and
    the head has given it up)."""
    registered = _registered(cluster)

    def state(node: Node) -> str:
        if not _processes(node):
            return "dead"
        if node.link and not network.is_up(node.link):
            return "cut"
        return "alive" if registered.get(node.name) else "lost"

    return {node.name: state(node) for node in cluster.nodes}


def kill(name: str) -> None:
    """End all processes of a node, as a power cut would."""
    _end(_node(_there(), name))


def cut(name: str) -> None:
    """Pull a node's link: it runs on and reaches nobody. The head's is the bridge, which cuts off every node."""
    network.set_link(_link(_there(), name), up=False)


def heal(name: str) -> None:
    """Plug a node's link in again, and start the node anew where it is dead or the head has given it up."""
    cluster = _there()
    node = _node(cluster, name)
    if node.link:
        network.set_link(node.link, up=True)
    if states(cluster)[name] == "alive":
        return
    if name == HEAD:
        raise ClusterMistake("the head is dead and the cluster with it: `frostline cluster down`, then `up`")
    _end(node)
    cluster = _started(cluster, [node])
    _wait_for(lambda: _registered(cluster).get(name), f"{name} to join")


def _there() -> Cluster:
    if (cluster := current()) is None:
        raise ClusterMistake("no cluster is up; `frostline cluster up` starts one")
    return cluster


def _node(cluster: Cluster, name: str) -> Node:
    named = {node.name: node for node in cluster.nodes}
    if name not in named:
        raise ClusterMistake(f"{name!r} is no node; there are {', '.join(named)}")
    return named[name]


def _link(cluster: Cluster, name: str) -> str:
    if (link := _node(cluster, name).link) is None:
        raise ClusterMistake(f"{name} has no link of its own: {cluster.lacking}")
    return link


def _claim(cluster: Cluster) -> None:
    """Write the state where there is none."""
    root().mkdir(mode=0o700, parents=True, exist_ok=True)
    new = root() / f"state-{os.getpid()}"
    new.write_text(_text(cluster))
    try:
        os.link(new, root() / "state.json")  # whole, or not at all
    except FileExistsError:
        there = _there()
        raise ClusterMistake(
            f"a cluster is up: {len(there.nodes) - 1} nodes, its head at {there.address}. `frostline cluster status` shows "
            "it, `frostline cluster down` takes it down"
        ) from None
    finally:
        new.unlink()


def _text(cluster: Cluster) -> str:
    return json.dumps(asdict(cluster), indent=2) + "\n"


def _wire(cluster: Cluster) -> None:
    assert cluster.bridge is not None
    assert cluster.subnet is not None
    subnet = IPv4Network(cluster.subnet)
    names = {node.name: node.address for node in cluster.nodes}
    network.make_bridge(cluster.bridge, subnet)
    for node in cluster.nodes[1:]:
        assert node.namespace is not None
        assert node.link is not None
        network.make_namespace(node.namespace, node.link, cluster.bridge, node.address, subnet, names)


def _started(cluster: Cluster, nodes: Sequence[Node]) -> Cluster:
    """The cluster with these nodes started, side by side. Raises NodeError."""
    for node in nodes:
        pid = _spawn(cluster, node)
        now = replace(node, pid=pid, born=_stat(pid)[2])
        cluster = replace(cluster, nodes=tuple(now if each.name == node.name else each for each in cluster.nodes))
        write_file(root() / "state.json", _text(cluster).encode())
    for node in nodes:
        _wait_for(lambda node=node: _is_started(cluster, _node(cluster, node.name)), f"{node.name} to start")
    return cluster


def _spawn(cluster: Cluster, node: Node) -> int:
    """Start a node in a session of its own, which outlives this process; its pid."""
    command = [
        *_entered(node),
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--disable-usage-stats",
    ]
    command += [
        f"--node-ip-address={node.address}",
        f"--node-name={node.name}",
        f"--temp-dir={cluster.folder}/{node.name}",
    ]
    command += [f"--num-cpus={node.cpus}", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]  # any that is free
    if node.name == HEAD:
        command += ["--head", f"--port={cluster.address.rpartition(':')[2]}", "--include-dashboard=false"]
        command += [f"--ray-client-server-port={_free_port()}"]
    else:
        command += [f"--address={cluster.address}"]
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    own = {"RAY_USAGE_STATS_ENABLED": "0", **({"GLOO_SOCKET_IFNAME": "eth0"} if node.namespace else {})}
    log = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return os.posix_spawnp(
        command[0],
        command,
        kept | environment() | own,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(_log(cluster, node)), log, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


def _entered(node: Node) -> list[str]:
    return network.enter(node.namespace, node.name) if node.namespace else []


def _log(cluster: Cluster, node: Node) -> Path:
    return Path(cluster.folder) / f"{node.name}.log"


def _is_started(cluster: Cluster, node: Node) -> bool:
    said = _log(cluster, node).read_text(errors="replace")
    if "Ray runtime started" in said:
        return True
    if not _processes(node):
        raise NodeError(f"{node.name} ({node.address}) did not start; it said:\n{said[-2000:]}")
    return False


def _wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise NodeError(
                f"waited {START_SECONDS} s for {what}. The logs are gone with the cluster; a firewall that drops what bridges "
                "forward (Docker's FORWARD policy, say) would do that"
            )
        time.sleep(0.2)


def _registered(cluster: Cluster) -> dict[str, bool]:
    """By name whether the head takes a node to be alive; empty where the head does not answer."""
    if not _processes(cluster.nodes[0]):
        return {}
    kept = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, cluster.address], env=kept | environment(), capture_output=True, text=True
    )
    if done.returncode:
        return {}
    alive: dict[str, bool] = {}
    said = next(
        line for line in done.stdout.splitlines() if line.startswith("[{")
    )  # Ray's warnings may come in between
    for node in json.loads(said):
        alive[node["NodeName"]] = alive.get(node["NodeName"], False) or node["Alive"]
    return alive


def _end(node: Node) -> None:
    deadline = time.monotonic() + DEATH_SECONDS
    while left := _processes(node):
        if time.monotonic() > deadline:
            raise NodeError(f"{node.name}: the processes {sorted(left)} do not end; give the same command again")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _processes(node: Node) -> set[int]:
    """All of a node's processes: those in its session, which Ray's daemons and workers do not leave, and in its namespace."""
    found = network.inside(node.namespace) if node.namespace else set()
    if not node.pid:
        return found
    with contextlib.suppress(ChildProcessError):
        os.waitpid(node.pid, os.WNOHANG)  # where it is a child of this very process
    sessions: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                state, session, born = _stat(int(entry.name))
                if session == node.pid and int(entry.name) == node.pid and born != node.born:
                    return found  # another's session by now
                if state not in "ZX":
                    sessions[int(entry.name)] = session
    return found | {pid for pid, session in sessions.items() if session == node.pid}


def _stat(pid: int) -> tuple[str, int, int]:
    """State, session and start of a process; see proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[3]), int(fields[19])


def _free_port(wanted: int = 0) -> int:
    """This port, or where it is taken any that is free."""
    with socket.socket() as tried:
        try:
            tried.bind(("", wanted))
        except OSError:
            return _free_port()
        return tried.getsockname()[1]
