"""The facts of this machine, or of every node of a Ray cluster, by a task pinned to each, for `doctor` to judge."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from frostline import machine

ANSWER_S = 180.0
"""How long a node may take to start a worker that imports this package, and to look."""
CLOCK_ROUNDS = 3


def examine(address: str | None = None, storage: str | None = None) -> dict[str, Any]:
    """Facts of this machine, or of all nodes of the cluster at `address` (as for ray.init), as JSON values for
    `doctor.findings`. `storage` is a folder that the first node writes into, and all read from.

    Raises ClusterError where no cluster answers, and ValueError for a storage that is no absolute folder.
    """
    if storage and ("://" in storage or (address and not Path(storage).is_absolute())):
        raise ValueError(f"--storage {storage}: give an absolute path, which means the same on every node, and no URI")
    return _examine_cluster(address, storage) if address else _examine_here(storage)


def _examine_here(storage: str | None) -> dict[str, Any]:
    facts = machine.look("here", storage=storage)
    facts["wrote"] = facts["read"] = None
    if storage:
        try:
            path = machine.put(storage)
            facts |= {"wrote": path, "read": machine.got(path)}
            machine.drop(path)
        except OSError as error:
            facts["storage_error"] = str(error)
    dashboard = machine.dashboard("http://127.0.0.1:8265", here=True)
    return {"cluster": None, "machines": [facts], "open": False, "dashboard": dashboard}


def _examine_cluster(address: str, storage: str | None) -> dict[str, Any]:
    from frostline.connection import cluster  # not at the top: this machine is examined without Ray

    with cluster(address, allow_open=True) as connected:
        is_open = connected()
        import ray
        from ray._private import worker

        nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=_order)
        driver: Any = worker.global_worker.node
        url = driver.webui_url
        pending = [_on(node, _look, _name(node), node["NodeManagerAddress"], storage) for node in nodes]
        machines: list[dict[str, Any]] = []
        for node, reference in zip(nodes, pending, strict=True):
            facts = _answer(reference)
            if "error" not in facts:
                facts |= {"ray_gpus": node["Resources"].get("GPU", 0), "clock": _clock(node)}
            machines.append({"node": _name(node), **facts})
        if storage:
            _share(nodes, machines, storage)
        return {
            "cluster": address,
            "machines": machines,
            "open": is_open,
            "dashboard": machine.dashboard(f"http://{url}") if url else None,
        }


def _order(node: dict[str, Any]) -> tuple[bool, str]:
    return "node:__internal_head__" not in node["Resources"], node["NodeManagerAddress"]


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} {node['NodeID'][:6]}"


def _on(node: dict[str, Any], function: Any, *arguments: Any) -> Any:
    """Call a function in a task on one node, whatever else runs there; a reference to its answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there).remote(*arguments)


def _answer(reference: Any) -> Any:
    """What a task answers, or {"error": why there is none}."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(reference, timeout=ANSWER_S)
    except GetTimeoutError:
        return {"error": f"no answer within {ANSWER_S:g} s"}
    except RayError as error:
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[-1]}


def _look(node: str, address: str, storage: str | None) -> dict[str, Any]:
    """`machine.look` on a node of Ray."""
    from ray._private import worker

    here: Any = worker.global_worker.node
    return machine.look(node, address, here.get_temp_dir_path(), storage)


def _clock(node: dict[str, Any]) -> dict[str, float] | None:
    """How far a node's clock is from this one's, by the shortest of a few round trips, and half of that as its error."""
    found = []
    for _ in range(CLOCK_ROUNDS):
        sent = time.time()
        there = _answer(_on(node, machine.clock))
        back = time.time()
        if isinstance(there, float):
            found.append(((back - sent) / 2, there - (sent + back) / 2))
    return {"error_s": min(found)[0], "offset_s": min(found)[1]} if found else None


def _share(nodes: list[dict[str, Any]], machines: list[dict[str, Any]], storage: str) -> None:
    """Write a file on the first node that answers, read it on all; adds to the facts of each."""
    able = [index for index, facts in enumerate(machines) if "error" not in facts]
    if not able:
        return
    path = _answer(_on(nodes[able[0]], machine.put, storage))
    if not isinstance(path, str):
        machines[able[0]]["storage_error"] = path["error"]
        return
    reads = [_on(nodes[index], machine.got, path) for index in able]
    for index, reference in zip(able, reads, strict=True):
        read = _answer(reference)
        machines[index] |= {"wrote": path if index == able[0] else None, "read": read is True}
        if isinstance(read, dict):
            machines[index]["storage_error"] = read["error"]
    _answer(_on(nodes[able[0]], machine.drop, path))
