"""Network namespaces joined by a bridge: several addresses, as of several machines, on one Linux host.

The host has the first address of the subnet on the bridge. A namespace sees the host and the other namespaces, and nothing
beyond: it has no route and no name server.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from ipaddress import IPv4Network
from pathlib import Path

SUBNETS = IPv4Network("10.87.0.0/16")
"""Where a subnet is looked for."""

ETC = Path("/etc/netns")
"""Whose folders `ip netns exec` lays over /etc; see ip-netns(8)."""


class SubnetError(ValueError):
    """A subnet that cannot be had."""


class NetworkError(RuntimeError):
    """The kernel refused a change to the network."""


def missing() -> str | None:
    """What this host lacks for namespaces of one's own, in words; None where nothing is missing."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if not shutil.which(tool):
            return f"the command `{tool}` is not there; install {package}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here ({tried.stderr.strip()})" if tried.returncode else None


def free_subnet(wanted: str | None = None) -> IPv4Network:
    """The subnet `wanted`, or else the first of 10.87.0.0/24, 10.87.1.0/24, … that this host has no address in and no route
    to. Raises SubnetError."""
    taken = _taken()
    if wanted is None:
        for subnet in SUBNETS.subnets(new_prefix=24):
            if not any(subnet.overlaps(network) for network in taken):
                return subnet
        raise SubnetError(f"all of {SUBNETS} is taken ({_said(SUBNETS, taken)}); name another with --subnet A.B.C.0/24")
    try:
        subnet = IPv4Network(wanted)
    except ValueError as error:
        raise SubnetError(f"--subnet {wanted}: {error}; give one such as {SUBNETS.network_address}/24") from None
    if subnet.prefixlen > 24 or not subnet.is_private:
        raise SubnetError(f"--subnet {wanted}: give a private one of at least 254 addresses, A.B.C.0/24")
    if any(subnet.overlaps(network) for network in taken):
        raise SubnetError(f"--subnet {wanted} is taken ({_said(subnet, taken)}); name another, or leave --subnet out")
    return subnet


def _taken() -> dict[IPv4Network, str]:
    """What this host has an address in or a route to, and by which interface."""
    found = {}
    for interface in json.loads(_ip("-json", "-4", "address", "show")):
        for address in interface["addr_info"]:
            found[IPv4Network((address["local"], address["prefixlen"]), strict=False)] = interface["ifname"]
    for route in json.loads(_ip("-json", "-4", "route", "show", "table", "all")):
        if route["dst"] not in ("default", "0.0.0.0/0"):
            found.setdefault(IPv4Network(route["dst"], strict=False), route.get("dev", "a route"))
    return found


def _said(subnet: IPv4Network, taken: Mapping[IPv4Network, str]) -> str:
    return ", ".join(f"{network} by {name}" for network, name in taken.items() if network.overlaps(subnet))


def make_bridge(bridge: str, subnet: IPv4Network) -> None:
    """A bridge on which the host has the subnet's first address."""
    _ip("link", "add", bridge, "type", "bridge")
    _ip("address", "add", f"{subnet[1]}/{subnet.prefixlen}", "dev", bridge)
    _ip("link", "set", bridge, "up")


def make_namespace(
    namespace: str, link: str, bridge: str, address: str, subnet: IPv4Network, names: Mapping[str, str]
) -> None:
    """A namespace with `address` on its eth0, which `link` joins to the bridge, and with host names of its own."""
    etc = ETC / namespace
    etc.mkdir(parents=True, exist_ok=True)
    lines = ["127.0.0.1 localhost", f"{subnet[1]} {socket.gethostname()}"]
    (etc / "hosts").write_text("".join(f"{line}\n" for line in [*lines, *(f"{names[name]} {name}" for name in names)]))
    (etc / "resolv.conf").write_text("# no name server: other names fail at once\n")
    _ip("netns", "add", namespace)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("link", "set", link, "master", bridge, "up")
    _ip("-netns", namespace, "address", "add", f"{address}/{subnet.prefixlen}", "dev", "eth0")
    for name in ("lo", "eth0"):
        _ip("-netns", namespace, "link", "set", name, "up")


def enter(namespace: str, host_name: str) -> list[str]:
    """What to put before a command so that it runs in a namespace, under a host name of its own."""
    named = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
    return ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", named, host_name]


def inside(namespace: str) -> set[int]:
    """The processes in a namespace; none where it is not there."""
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return set(map(int, done.stdout.split()))


def remove_namespace(namespace: str, link: str) -> None:
    """Take back `make_namespace`, as far as it came."""
    _remove("link", link)  # that of the namespace goes with it; by itself it would go a while after the namespace
    if namespace in _ip("netns", "list").split():
        _ip("netns", "delete", namespace)
    shutil.rmtree(ETC / namespace, ignore_errors=True)
    with contextlib.suppress(OSError):
        ETC.rmdir()  # others may have folders there


def remove_bridge(bridge: str) -> None:
    """Take back `make_bridge`, as far as it came."""
    _remove("link", bridge)


def set_link(link: str, up: bool) -> None:
    """Plug a link in, or pull it out."""
    _ip("link", "set", link, "up" if up else "down")


def is_up(link: str) -> bool:
    """Whether a link is there and plugged in."""
    return link in _links() and "UP" in _links()[link]


def _remove(kind: str, name: str) -> None:
    if name in _links():
        _ip(kind, "delete", name)


def _links() -> dict[str, list[str]]:
    return {link["ifname"]: link["flags"] for link in json.loads(_ip("-json", "link", "show"))}


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NetworkError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout
