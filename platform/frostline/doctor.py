"""From the facts of machines to findings: what is as it should be for a search there, what is not, and what to do about it.

Pure functions of plain data, which `nodes` gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Facts = Mapping[str, Any]
State = Literal["ok", "warn", "fail"]
WORSE: tuple[State, ...] = ("fail", "warn")

PACKAGES = ("python", "frostline", "torch", "torchvision", "timm", "ray", "pyarrow", "numpy")
GB = 10**9
LEAST_FREE = {"warn": 10 * GB, "fail": GB}
RAY_REFUSES_AT = 0.95  # share of a disk that is full, above which Ray spills no objects
CLOCK_S = {"warn": 1.0, "fail": 60.0}
SLOW_LOOK_UP_S = 1.0


@dataclass(frozen=True)
class Finding:
    """One check of one node."""

    node: str
    check: str
    state: State
    found: str
    remedy: str = ""
    """Empty where nothing is to be done."""


def findings(facts: Facts) -> list[Finding]:
    """All findings on what `nodes.examine` answers, node by node, and the cluster's as a whole."""
    machines = [each for each in facts["machines"] if "error" not in each]
    found = [
        Finding(each["node"], "answer", "fail", each["error"], "see the logs of this node's raylet, and start it again")
        for each in facts["machines"]
        if "error" in each
    ]
    for each in machines:
        found += [
            of_versions(each, machines[0]),
            of_devices(each),
            of_token(each),
            of_sockets(each),
            *of_storage(each),
            *(of_disk(each["node"], name, each[name]) for name in ("temp", "storage") if each[name]),
            *of_network(each),
        ]
        if each.get("clock") and each is not machines[0]:
            found.append(of_clock(each, machines[0]))
    found.append(of_exposure(facts["dashboard"], facts["cluster"], facts["open"]))
    return found


def of_versions(facts: Facts, first: Facts) -> Finding:
    """Whether a node has all packages, in the versions that the first one has."""
    mine, theirs = facts["versions"], first["versions"]
    missing = [name for name in PACKAGES if name not in mine]
    other = [
        f"{name} {mine[name]} ({theirs[name]} on {first['node']})"
        for name in PACKAGES
        if name in mine and name in theirs and mine[name] != theirs[name]
    ]
    if missing or other:
        said = [f"without {', '.join(missing)}"] * bool(missing) + other
        return Finding(
            facts["node"],
            "versions",
            "fail",
            "; ".join(said),
            "install the same versions on every node: rows of one study come from all of them",
        )
    return Finding(facts["node"], "versions", "ok", ", ".join(f"{name} {mine[name]}" for name in PACKAGES))


def of_devices(facts: Facts) -> Finding:
    """What a trial can compute on there, and whether torch sees the GPUs that Ray gives out."""
    names, cpus, given = facts["devices"], facts["cpus"], facts.get("ray_gpus") or 0
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    found = f"{counted or 'no GPU'}, {cpus} CPU cores"
    if facts["torch_error"]:
        remedy = "install torch there anew; `python -c 'import torch'` shows the whole error"
        return Finding(facts["node"], "devices", "fail", f"torch cannot be imported: {facts['torch_error']}", remedy)
    if given > len(names):
        remedy = "install a torch built for this node's driver, or start Ray there with --num-gpus=0"
        return Finding(facts["node"], "devices", "fail", f"Ray gives out {given:g} GPUs, torch sees {found}", remedy)
    return Finding(facts["node"], "devices", "ok", found)


def of_token(facts: Facts) -> Finding:
    """Which token a process there would use; the token itself is in no fact."""
    mode = facts["auth"] or ("token" if facts["token"] else "not set")
    if mode == "token" and not facts["token"]:
        remedy = "put the head's token into ~/.ray/auth_token, or its path into RAY_AUTH_TOKEN_PATH"
        return Finding(facts["node"], "authentication", "fail", "RAY_AUTH_MODE=token, and no token", remedy)
    if facts["token_shared"]:
        said, remedy = f"others can read the token at {facts['token_shared']}", f"chmod 600 {facts['token_shared']}"
        return Finding(facts["node"], "authentication", "fail", f"{said}, and run code with it", remedy)
    where = f", token at {facts['token']}" if facts["token"] else ", no token"
    return Finding(facts["node"], "authentication", "ok", f"mode {mode}{where}")


def of_sockets(facts: Facts) -> Finding:
    """Where Ray's processes there are reached from elsewhere; that they are is a cluster's way, and what `of_exposure` judges."""
    named = [f"{name} {', '.join(map(str, ports))}" for name, ports in facts["sockets"].items()]
    found = f"beyond loopback: {'; '.join(named)}" if named else "none of Ray's beyond loopback"
    return Finding(facts["node"], "sockets", "ok", found)


def of_exposure(dashboard: Facts | None, cluster: str | None, is_open: bool) -> Finding:
    """Whether whoever reaches the dashboard, or the head's port, may run code: both were asked without a token."""
    node, remedy = cluster or "here", "start the cluster with RAY_AUTH_MODE=token, or bind it to 127.0.0.1 and tunnel"
    if dashboard and not dashboard["token"] and not dashboard["loopback"]:
        said = f"{dashboard['url']} is open: whoever reaches it runs code on the cluster"
        return Finding(node, "exposure", "fail", said, remedy)
    if is_open:
        said = f"the head of {node} asks for no token: whoever reaches it may join the cluster and run code"
        return Finding(node, "exposure", "fail", said, remedy)
    if dashboard is None:
        return Finding(
            node, "exposure", "ok", "no dashboard answers" if cluster else "no dashboard answers on port 8265"
        )
    bound = "on loopback only" if dashboard["loopback"] else "reachable from elsewhere"
    asked = "wants a token" if dashboard["token"] else "wants no token"
    return Finding(node, "exposure", "ok", f"{dashboard['url']} is {bound} and {asked}")


def of_storage(facts: Facts) -> Iterator[Finding]:
    """Whether a file that the first node wrote is read on this one."""
    storage = facts["storage"]
    if not storage:
        return
    found = (
        f"{storage['path']} is not there yet; {storage['there']} is"
        if storage["there"] != storage["path"]
        else storage["path"]
    )
    remedy = "mount the same storage at this path on every node, writable; the study's folder and the data must be seen by all"
    if facts.get("storage_error"):
        yield Finding(facts["node"], "storage", "fail", f"{storage['path']}: {facts['storage_error']}", remedy)
    elif facts.get("wrote"):
        state: State = "ok" if facts["read"] else "fail"
        did = "written and read" if facts["read"] else "written, and not read again"
        yield Finding(facts["node"], "storage", state, f"{found}: {did}", "" if facts["read"] else remedy)
    elif facts.get("read"):
        yield Finding(facts["node"], "storage", "ok", f"{found}: read what the first node wrote")
    elif facts.get("read") is False:
        yield Finding(facts["node"], "storage", "fail", f"{found}: does not see what the first node wrote", remedy)


def of_disk(node: str, name: str, disk: Facts) -> Finding:
    """Whether a disk has space left: Ray's temporary folder, or that of the study."""
    free, total = disk["free_bytes"], disk["total_bytes"]
    full = 1 - free / total
    state: State = _worst(lambda state: free < LEAST_FREE[state])
    if name == "temp" and full > RAY_REFUSES_AT:
        state = "fail"
    found = f"{disk['path']}: {free / GB:.1f} of {total / GB:.0f} GB free"
    remedies = {
        "temp": "free space there, or start Ray with --temp-dir on a larger disk; Ray spills nothing to a disk that is 95 % full",
        "storage": "free space there: `frostline features clean` deletes stored activations that nothing uses",
    }
    return Finding(node, f"disk ({name})", state, found, "" if state == "ok" else remedies[name])


def of_network(facts: Facts) -> Iterator[Finding]:
    """Which interface carries the node's address, and whether gloo and NCCL will find it: they go by the host's name."""
    address, variables = facts["address"], facts["variables"]
    carrier = next((name for name, ip in facts["interfaces"].items() if ip == address), None)
    named, loopback = facts["host_address"], address.startswith("127.")
    found = f"{address} on {carrier or 'no interface that is seen'}; {facts['host']} resolves to {named or 'nothing'}"
    told = {name: value for name, value in variables.items() if value}
    set_both = " ".join(f"{name}={carrier}" for name in variables)
    if wrong := [f"{name}={value}" for name, value in told.items() if carrier and value != carrier]:
        said, remedy = f"{', '.join(wrong)}, and {found}", f"set {set_both} on this node, before `ray start`"
        yield Finding(facts["node"], "network", "warn", said, remedy)
    elif carrier is None:
        yield Finding(
            facts["node"], "network", "warn", found, "trials over several nodes need an interface with this address"
        )
    elif named != address and not loopback and len(told) < len(variables):
        remedy = (
            f"set {set_both} on this node, before `ray start`: gloo and NCCL would take the address of the host's name"
        )
        yield Finding(facts["node"], "network", "warn", found, remedy)
    else:
        yield Finding(facts["node"], "network", "ok", found)
    if facts["look_up_s"] > SLOW_LOOK_UP_S:
        said = f"to look {facts['host']} up took {facts['look_up_s']:.1f} s"
        yield Finding(facts["node"], "network", "warn", said, f"add `{address} {facts['host']}` to /etc/hosts there")


def of_clock(facts: Facts, first: Facts) -> Finding:
    """How far a node's clock is from the first one's, less what the measurement cannot tell."""
    ours, theirs = facts["clock"], first.get("clock") or {"offset_s": 0.0, "error_s": 0.0}
    offset, error = ours["offset_s"] - theirs["offset_s"], ours["error_s"] + theirs["error_s"]
    sure = abs(offset) - error
    state: State = _worst(lambda state: sure > CLOCK_S[state])
    found = f"{offset:+.2f} ± {error:.2f} s from {first['node']}"
    remedy = "" if state == "ok" else "let NTP or chrony set the clock: times in rows and logs are those of the nodes"
    return Finding(facts["node"], "clock", state, found, remedy)


def _worst(reached: Callable[[State], bool]) -> State:
    """The worst state whose limit is reached."""
    for state in WORSE:
        if reached(state):
            return state
    return "ok"
