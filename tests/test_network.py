"""Addresses of their own for several nodes on one host, made and taken back for real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from frostline import network

LACKING = network.missing()
needs_namespaces = pytest.mark.skipif(LACKING is not None, reason=f"no network namespaces here: {LACKING}")

BRIDGE, SPACES = "fl-test", ("fl-test-a", "fl-test-b")


def traces() -> list[str]:
    """What there is of ours."""
    links = [link["ifname"] for link in json.loads(network._ip("-json", "link", "show"))]
    spaces = network._ip("netns", "list").split()
    folders = [path.name for path in network.ETC.iterdir()] if network.ETC.exists() else []
    return [name for name in [*links, *spaces, *folders] if name.startswith(BRIDGE)]


def reaches(space: str, name: str) -> bool:
    """Whether a host name is found from a namespace and a packet sent there is answered (here: refused, as nobody listens)."""
    script = f"""if True:
        import socket
        tried = socket.socket()
        tried.settimeout(2)
        try:
            tried.connect(({name!r}, 9))
        except ConnectionRefusedError:
            print(True)
        except OSError:
            print(False)"""
    command = [*network.enter(space, "here"), sys.executable, "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "True"


@pytest.fixture
def subnet() -> Iterator[IPv4Network]:
    """Two namespaces on a bridge."""
    subnet = network.free_subnet()
    addresses = {"a": str(subnet[11]), "b": str(subnet[12]), "head": str(subnet[1])}
    network.make_bridge(BRIDGE, subnet)
    try:
        for space, name in zip(SPACES, "ab", strict=True):
            network.make_namespace(space, f"{space}-0", BRIDGE, addresses[name], subnet, addresses)
        yield subnet
    finally:
        for space in SPACES:
            network.remove_namespace(space, f"{space}-0")
        network.remove_bridge(BRIDGE)
        assert traces() == []


@needs_namespaces
def test_namespaces_reach_each_other_and_the_host_by_name_until_a_link_is_pulled(subnet: IPv4Network) -> None:
    first, second = SPACES
    assert reaches(first, "b")
    assert reaches(second, "head")
    assert not reaches(first, "elsewhere.invalid")
    network.set_link(f"{second}-0", up=False)
    assert not network.is_up(f"{second}-0")
    assert not reaches(first, "b")
    assert reaches(first, "head")
    network.set_link(f"{second}-0", up=True)
    assert reaches(first, "b")


@needs_namespaces
def test_a_command_in_a_namespace_has_its_host_name_and_is_found(subnet: IPv4Network) -> None:
    command = [
        *network.enter(SPACES[0], "node7"),
        "sh",
        "-c",
        "read name </proc/sys/kernel/hostname; echo $name; read line",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as inside:
        assert inside.stdin is not None
        assert inside.stdout is not None
        assert inside.stdout.readline() == "node7\n"
        assert network.inside(SPACES[0]) == {inside.pid}
        inside.stdin.write("\n")
    assert network.inside(SPACES[0]) == set()
    assert network.inside("fl-test-none") == set()


@needs_namespaces
def test_what_was_half_made_or_never_made_is_taken_back_too(subnet: IPv4Network) -> None:
    network._ip("link", "delete", f"{SPACES[0]}-0")
    network.remove_namespace(SPACES[0], f"{SPACES[0]}-0")
    network.remove_namespace(SPACES[0], f"{SPACES[0]}-0")
    network.remove_bridge("fl-test-none")
    with pytest.raises(network.NetworkError, match="`ip link add fl-test type bridge` failed: .*exists"):
        network.make_bridge(BRIDGE, subnet)


@needs_namespaces
def test_a_subnet_that_is_taken_is_refused_and_the_next_one_found(subnet: IPv4Network) -> None:
    assert network.free_subnet() != subnet
    with pytest.raises(network.SubnetError, match=rf"{subnet} is taken \({subnet} by {BRIDGE}.*leave --subnet out"):
        network.free_subnet(str(subnet))
    free = str(network.free_subnet())
    assert str(network.free_subnet(free)) == free


@needs_namespaces
@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("10.9.0.1/24", "has host bits set"),
        ("nonsense", "give one such as 10.87.0.0/24"),
        ("10.99.9.0/28", "at least 254 addresses"),
        ("8.8.8.0/24", "give a private one"),
    ],
)
def test_what_is_no_private_subnet_is_refused(wanted: str, said: str) -> None:
    with pytest.raises(network.SubnetError, match=said):
        network.free_subnet(wanted)
