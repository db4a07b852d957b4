"""Findings on facts, and facts of this machine and of a real cluster."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from _head import TOKEN, Head, ray_head
from frostline import machine
from frostline.cli import main
from frostline.doctor import PACKAGES, Finding, findings
from frostline.nodes import examine
from frostline.versions import versions

GB = 10**9


def facts_of(node: str = "10.0.0.1 abc", **other: Any) -> dict[str, Any]:
    """Of a node on which all is well."""
    disk = {"path": "/tmp/ray", "there": "/tmp/ray", "free_bytes": 400 * GB, "total_bytes": 500 * GB}
    return {
        "node": node,
        "versions": dict.fromkeys(PACKAGES, "1.0"),
        "cpus": 8,
        "devices": ["H100", "H100"],
        "torch_error": None,
        "ray_gpus": 2.0,
        "auth": "token",
        "token": "~/.ray/auth_token",
        "token_shared": None,
        "sockets": {"gcs_server": [6379]},
        "host": "one",
        "host_address": "10.0.0.1",
        "look_up_s": 0.0,
        "address": "10.0.0.1",
        "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
        "variables": {"GLOO_SOCKET_IFNAME": None, "NCCL_SOCKET_IFNAME": None},
        "temp": disk,
        "storage": disk | {"path": "/shared/study", "there": "/shared/study"},
        "wrote": None,
        "read": True,
        "clock": {"offset_s": 0.0, "error_s": 0.01},
    } | other


def found_on(
    *machines: dict[str, Any], dashboard: dict[str, Any] | None = None, is_open: bool = False
) -> dict[str, list[Finding]]:
    """Findings that are not ok, by check; all where nothing is wrong."""
    facts = {"cluster": "10.0.0.1:6379", "machines": list(machines), "open": is_open, "dashboard": dashboard}
    found = findings(facts)
    for each in found:
        assert (each.remedy == "") == (each.state == "ok")
    wrong = [each for each in found if each.state != "ok"]
    return {each.check: [other for other in wrong if other.check == each.check] for each in wrong}


def test_nothing_is_found_where_all_is_well() -> None:
    first = facts_of(wrote="/shared/study/.frostline-doctor-1")
    assert found_on(first, facts_of("10.0.0.1 def")) == {}
    facts = {"cluster": "10.0.0.1:6379", "machines": [first, facts_of("other")], "open": False, "dashboard": None}
    found = findings(facts)
    assert [each.check for each in found if each.node == "other"] == [
        *(
            "versions",
            "devices",
            "authentication",
            "sockets",
            "storage",
            "disk (temp)",
            "disk (storage)",
            "network",
            "clock",
        )
    ]


def test_versions_that_differ_or_are_missing_fail_where_they_do() -> None:
    other = dict.fromkeys(PACKAGES, "1.0") | {"torch": "1.1"}
    del other["timm"]
    (found,) = found_on(facts_of(), facts_of("other", versions=other))["versions"]
    assert (found.node, found.state) == ("other", "fail")
    assert found.found == "without timm; torch 1.1 (1.0 on 10.0.0.1 abc)"


@pytest.mark.parametrize(
    ("check", "facts", "state", "said", "remedy"),
    [
        ("devices", {"devices": []}, "fail", "Ray gives out 2 GPUs, torch sees no GPU, 8 CPU cores", "--num-gpus=0"),
        ("devices", {"torch_error": "ImportError: libfoo"}, "fail", "cannot be imported: ImportError: libfoo", "anew"),
        ("authentication", {"token": None}, "fail", "and no token", "~/.ray/auth_token"),
        ("authentication", {"token_shared": "/t"}, "fail", "others can read the token at /t", "chmod 600 /t"),
        ("storage", {"read": False}, "fail", "/shared/study: does not see what the first node wrote", "mount the same"),
        ("storage", {"storage_error": "[Errno 30] Read-only"}, "fail", "/shared/study: [Errno 30]", "writable"),
        ("network", {"host_address": "127.0.1.1"}, "warn", "10.0.0.1 on eth0; one resolves to 127.0.1.1",
         "set GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"),
        ("network", {"host_address": None}, "warn", "one resolves to nothing", "GLOO_SOCKET_IFNAME=eth0"),
        ("network", {"variables": {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "eth0"}}, "warn",
         "GLOO_SOCKET_IFNAME=lo", "GLOO_SOCKET_IFNAME=eth0"),
        ("network", {"interfaces": {}}, "warn", "no interface that is seen", "need an interface"),
        ("network", {"look_up_s": 5.0}, "warn", "to look one up took 5.0 s", "add `10.0.0.1 one` to /etc/hosts"),
        ("clock", {"clock": {"offset_s": 3.0, "error_s": 0.1}}, "warn", "+3.00 ± 0.11 s", "NTP"),
        ("clock", {"clock": {"offset_s": -90.0, "error_s": 0.1}}, "fail", "-90.00 ± 0.11 s", "NTP"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_node_comes_with_its_remedy(
    check: str, facts: dict[str, Any], state: str, said: str, remedy: str
) -> None:
    wrong = found_on(facts_of(), facts_of("other", **facts))
    assert list(wrong) == [check]
    (found,) = wrong[check]
    assert (found.node, found.state) == ("other", state)
    assert said in found.found
    assert remedy in found.remedy


def test_interfaces_that_are_told_need_no_host_name() -> None:
    told = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "eth0")
    assert found_on(facts_of(host_address="127.0.1.1", variables=told)) == {}


def test_a_clock_is_not_judged_by_less_than_its_error() -> None:
    assert found_on(facts_of(), facts_of("other", clock={"offset_s": 3.0, "error_s": 2.5})) == {}


@pytest.mark.fault(30)
@pytest.mark.parametrize(("free_gb", "state"), [(400, None), (20, "fail"), (9, "fail"), (0.5, "fail")])
def test_a_temporary_folder_that_is_full_to_95_percent_is_refused_by_ray(free_gb: float, state: str | None) -> None:
    disk = {"path": "/tmp/ray", "there": "/tmp", "free_bytes": free_gb * GB, "total_bytes": 500 * GB}
    wrong = found_on(facts_of(temp=disk))
    assert [each.state for each in wrong.get("disk (temp)", [])] == [state] * (state is not None)
    study = found_on(facts_of(storage=disk)).get("disk (storage)", [])
    assert [each.state for each in study] == {400: [], 20: [], 9: ["warn"], 0.5: ["fail"]}[free_gb]


def test_a_node_that_does_not_answer_is_a_failure_of_its_own() -> None:
    (found,) = found_on(facts_of(), {"node": "gone", "error": "no answer within 180 s"})["answer"]
    assert (found.node, found.state, found.found) == ("gone", "fail", "no answer within 180 s")


def test_a_public_dashboard_and_a_head_that_ask_for_no_token_fail() -> None:
    url = "http://10.0.0.1:8265"
    open_to_all = {"url": url, "token": False, "loopback": False}
    (found,) = found_on(facts_of(auth=None), dashboard=open_to_all)["exposure"]
    assert (found.state, found.found) == ("fail", f"{url} is open: whoever reaches it runs code on the cluster")
    (found,) = found_on(facts_of(), dashboard=open_to_all | {"loopback": True}, is_open=True)["exposure"]
    assert (found.state, found.found.partition(":6379 ")[2].partition(":")[0]) == ("fail", "asks for no token")
    assert found_on(facts_of(), dashboard=open_to_all | {"token": True}) == {}
    here = {
        "cluster": None,
        "machines": [facts_of(auth=None, token=None)],
        "open": False,
        "dashboard": open_to_all | {"loopback": True},
    }
    assert {each.state for each in findings(here)} == {"ok"}


def test_this_machine_is_examined_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = examine(storage=str(tmp_path / "study"))
    (mine,) = facts["machines"]
    assert mine["versions"] == versions()
    assert mine["interfaces"]["lo"] == "127.0.0.1"
    assert (mine["read"], mine["storage"]["there"]) == (True, str(tmp_path))
    assert list(tmp_path.iterdir()) == [], "what is written for the check is deleted"
    assert main(["doctor", "--storage", str(tmp_path), "--json"]) in (0, 1)
    said = json.loads(capsys.readouterr().out)
    assert {each["node"] for each in said} == {"here"}
    assert {"versions", "devices", "storage", "network", "exposure"} <= {each["check"] for each in said}
    assert main(["doctor", "--storage", "s3://bucket/study"]) == 2


LISTEN = "import socket, time; s = socket.create_server(('0.0.0.0', 0)); print(s.getsockname()[1], flush=True); time.sleep(60)"


def test_what_listens_beyond_loopback_is_told_from_what_does_not() -> None:
    for host, public in (("127.0.0.1", False), ("0.0.0.0", True)):
        with socket.create_server((host, 0)) as server:
            assert machine.listens_publicly(server.getsockname()[1]) is public
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, "/site-packages/ray/gcs_server"], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        port = int(other.stdout.readline())
        assert port in machine.ray_sockets()["gcs_server"]
        other.kill()
    assert machine.dashboard("http://127.0.0.1:9") is None


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    with ray_head(tmp_path, nodes=2) as started:
        yield started


@pytest.mark.fault(31)
def test_every_node_of_a_cluster_is_examined(tmp_path: Path, head: Head) -> None:
    study = tmp_path / "shared"
    study.mkdir()
    done = head.run(tmp_path, "doctor", "--address", head.address, "--storage", str(study))
    assert done.returncode in (0, 1), done.stdout  # as this machine's disks are
    assert "Traceback" not in done.stdout
    assert TOKEN not in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert len([line for line in lines if line.startswith("ok versions python")]) == 2, done.stdout
    assert f"ok storage {study}: written and read" in lines, done.stdout
    assert f"ok storage {study}: read what the first node wrote" in lines, done.stdout
    assert lines.count("ok authentication mode token, token at RAY_AUTH_TOKEN_PATH") == 2, done.stdout
    assert any(line.startswith(("ok clock +0.", "ok clock -0.")) for line in lines), done.stdout
    assert f"ok exposure {head.dashboard} is on loopback only and wants a token" in lines, done.stdout
    assert len([line for line in lines if line.startswith("ok sockets ")]) == 2, done.stdout
    assert list(study.iterdir()) == []
