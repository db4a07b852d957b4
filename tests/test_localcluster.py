"""A real Ray cluster of several nodes on this host: searches on it, faults, and what is left of it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from _tls import certified
from frostline import localcluster, network, results
from frostline.cache import cache_root
from frostline.cli import main
from frostline.localcluster import Cluster, NodeError
from frostline.testing import toy_job
from test_network import LACKING, needs_namespaces
from test_tune import committed, epoch_numbers, numbers

NODES = ("node1", "node2", "node3")

TASKS = """
import json, socket, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

def where():
    return ray.util.get_node_ip_address(), socket.gethostname()

ray.init(sys.argv[1], log_to_driver=False)
nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
print(json.dumps(ray.get([ray.remote(where).options(scheduling_strategy=place).remote() for place in places])))
"""

SEARCH = """
import sys
from pathlib import Path
import frostline
from frostline.testing import toy_job

frostline.search(toy_job(Path(sys.argv[2]), sys.argv[3:]), address=sys.argv[1])
"""

TRAIN = """
import sys
from pathlib import Path
import frostline
from frostline.testing import toy_training

frostline.train(toy_training(Path(sys.argv[2]), sys.argv[3:]), address=sys.argv[1])
"""

HUB = """
import sys
from pathlib import Path
import safetensors.torch
import timm
import torch
from frostline.testing import ToyNet

torch.manual_seed(5)
folder = Path(sys.argv[1]) / "hub" / "models--timm--test_resnet.r160_in1k"
(folder / "refs").mkdir(parents=True)
(folder / "refs" / "main").write_text("0" * 40)
snapshot = folder / "snapshots" / ("0" * 40)
snapshot.mkdir(parents=True)
safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), snapshot / "model.safetensors")
safetensors.torch.save_file(ToyNet().state_dict(), Path(sys.argv[1]) / "toy.safetensors")
"""
"""Writes what the driver alone has: weights that came from a hub, and a file."""

PLAIN = ("search.sampler=qmc", "search.pruner.kind=none", "features.cache=none")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes of one CPU; the head misses one that is gone within seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_timeout_ms", "1000")
        patch.setenv("RAY_health_check_failure_threshold", "4")
        made = localcluster.up(3, 1)
        yield made
        localcluster.down()


def driver(
    cluster: Cluster, script: str, *arguments: str, entered: Sequence[str] = (), **settings: str
) -> subprocess.Popen:
    """A process that connects to the cluster, of the host's or `entered` into a node."""
    return subprocess.Popen(
        [*entered, sys.executable, "-c", script, cluster.address, *arguments],
        env=os.environ | localcluster.environment() | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def landed(cluster: Cluster) -> list[list[str]]:
    """Address and host name of where a task landed, a task a node."""
    output = answer(driver(cluster, TASKS))
    return json.loads(next(line for line in output.splitlines() if line.startswith("[[")))


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def traces(cluster: Cluster) -> list[str]:
    """What is there of a cluster: folders, links, namespaces, processes."""
    folders = [Path(cluster.folder), localcluster.root()]
    found = [str(folder) for folder in folders if folder.exists()]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            found += [f"{entry.name}: {command}"] if cluster.folder in command or cluster.address in command else []
    if cluster.bridge:
        links = json.loads(subprocess.run(["ip", "-json", "link"], check=True, capture_output=True).stdout)
        spaces = subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout.split()
        folders = [path.name for path in network.ETC.iterdir()] if network.ETC.exists() else []
        names = [*(link["ifname"] for link in links), *spaces, *folders]
        found += [name for name in names if name.startswith(cluster.bridge)]
    return found


def test_a_task_lands_on_every_address(cluster: Cluster) -> None:
    found = landed(cluster)
    members = cluster.nodes[1:]
    assert [node.name for node in members] == list(NODES)
    assert sorted(address for address, _ in found) == sorted(node.address for node in members)
    if not LACKING:
        assert {host: address for address, host in found} == {node.name: node.address for node in members}
        assert len({node.address for node in cluster.nodes}) == 4


def test_a_search_uses_several_nodes_and_gives_the_rows_of_an_inline_run(cluster: Cluster, tmp_path: Path) -> None:
    options = (*PLAIN, "search.trials=9", "train.epochs=5")
    searching = driver(cluster, SEARCH, str(tmp_path / "cluster" / "study"), *options)
    inline = subprocess.run(
        [
            sys.executable,
            "-c",
            SEARCH.replace("address=sys.argv[1]", "inline=True"),
            "",
            str(tmp_path / "study"),
            *options,
        ],
        capture_output=True,
        text=True,
    )
    assert inline.returncode == 0, inline.stderr
    answer(searching)
    study = tmp_path / "cluster" / "study"
    assert len(numbers(study)) == 9 + 2
    assert numbers(study) == numbers(tmp_path / "study")
    assert epoch_numbers(study) == epoch_numbers(tmp_path / "study")
    nodes = {row["node"] for row in results.read_trials(study).to_pylist()}
    if not LACKING:
        assert nodes <= set(NODES)
        assert len(nodes) > 1


@pytest.mark.fault(5)
@needs_namespaces
def test_a_search_goes_on_without_a_node_that_was_killed(cluster: Cluster, tmp_path: Path) -> None:
    job = toy_job(tmp_path / "study", [*PLAIN, "search.trials=12", "train.epochs=40"])
    searching = driver(cluster, SEARCH, str(job.folder), *PLAIN, "search.trials=12", "train.epochs=40")
    wait_until(lambda: committed(job.folder) or searching.poll() is not None, 120)
    assert searching.poll() is None, searching.communicate()
    used = {row["node"] for row in results.read_trials(job.folder).to_pylist()}
    lost = max(used)
    localcluster.kill(lost)
    assert localcluster.states(cluster)[lost] == "dead"
    answer(searching)
    rows = results.read_trials(job.folder).to_pylist()
    assert len(rows) == len({row["trial_id"] for row in rows}) == 12 + 2
    failed = [row for row in rows if row["status"] != "complete"]
    assert [row["error_kind"] for row in failed] in ([], ["worker_lost"]), "at most the trial that was training there"
    assert {row["node"] for row in rows} - {lost, None}, "others have done the rest"


def freeze(name: str) -> None:
    """Stop all processes of a node where they are."""
    signal_all(name, signal.SIGSTOP)


def signal_all(name: str, number: int) -> None:
    for pid in localcluster._processes(localcluster._node(localcluster._there(), name)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.mark.long
@needs_namespaces
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(localcluster.kill, marks=pytest.mark.fault(5)),
        pytest.param(localcluster.cut, marks=pytest.mark.fault(9)),
        pytest.param(freeze, marks=pytest.mark.fault(8)),
    ],
)
def test_a_training_goes_on_without_a_node_that_is_lost(
    cluster: Cluster, tmp_path: Path, fault: Callable[[str], None]
) -> None:
    """Two workers on two of three nodes; one of these goes, and the training ends with the bits of one that had both. What the
    lost ones say when they are back changes nothing."""
    options = ("scaling.workers=2", "scaling.checkpoint_s=0", "train.epochs=30", "data.per_class=40")
    training = driver(cluster, TRAIN, str(tmp_path / "study"), *options)
    kept = tmp_path / "study" / "checkpoints" / "train-00000-c0.safetensors"
    wait_until(lambda: kept.exists() or training.poll() is not None, 120)
    assert training.poll() is None, training.communicate()
    lost = max(node.name for node in localcluster._there().nodes if trains(node.pid))
    fault(lost)
    answer(training)
    (row,) = results.read_trials(tmp_path / "study").to_pylist()
    assert (row["status"], row["epochs"]) == ("complete", 30)
    assert lost not in (used := row["node"].split(", "))
    assert len(used) == 2
    if fault is freeze:
        signal_all(lost, signal.SIGCONT)
    localcluster.heal(lost)
    wait_until(lambda: localcluster._registered(cluster)[lost])
    assert sorted(row["epoch"] for row in results.read_epochs(tmp_path / "study").to_pylist()) == [*range(1, 31)]
    assert len(results.read_trials(tmp_path / "study")) == 1
    answer(driver(cluster, TRAIN, str(tmp_path / "undisturbed"), *options))
    models = [(tmp_path / name / "bundle" / "model.safetensors").read_bytes() for name in ("study", "undisturbed")]
    assert models[0] == models[1]


@pytest.mark.fault(7)
@pytest.mark.long
@needs_namespaces
def test_a_training_that_may_goes_on_with_fewer_workers(cluster: Cluster, tmp_path: Path) -> None:
    options = ("scaling.workers=3", "scaling.min_workers=2", "scaling.checkpoint_s=0", "train.epochs=30")
    training = driver(cluster, TRAIN, str(tmp_path / "study"), *options)
    kept = tmp_path / "study" / "checkpoints" / "train-00000-c0.safetensors"
    wait_until(lambda: kept.exists() or training.poll() is not None, 120)
    assert training.poll() is None, training.communicate()
    assert all(trains(node.pid) for node in localcluster._there().nodes[1:]), "three at first"
    localcluster.kill("node2")
    answer(training)
    (row,) = results.read_trials(tmp_path / "study").to_pylist()
    assert (row["status"], row["epochs"], row["workers"], row["node"]) == ("complete", 30, 2, "node1, node3")
    localcluster.heal("node2")
    wait_until(lambda: localcluster._registered(cluster)["node2"])


@pytest.fixture
def drivers_own(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A folder that no node sees, and a cache of weights for each node: over both there is another file system on the nodes."""
    folder, kept = tmp_path / "own", cache_root() / "weights"
    for each in (folder, kept):
        each.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", HUB, str(folder)], check=True)
    for node in cluster.nodes[1:]:
        for each in (folder, kept):
            on_node(node.name, "mount", "-t", "tmpfs", "none", str(each))
    yield folder
    for node in cluster.nodes[1:]:
        for each in (folder, kept):
            on_node(node.name, "umount", "--lazy", str(each))


def on_node(name: str, *command: str) -> str:
    """What a command says that sees files as a node does."""
    pid = localcluster._node(localcluster._there(), name).pid
    entered = ["nsenter", "--target", str(pid), "--mount", *command]
    return subprocess.run(entered, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("source", ["hub", "file"])
def test_weights_that_only_the_driver_has_train_on_every_node(
    cluster: Cluster, drivers_own: Path, tmp_path: Path, source: str
) -> None:
    """In a search, and in trials of three workers each. No node sees the driver's files, or could ask a hub."""
    plain = (*PLAIN, "train.epochs=2", "confirm.seeds=0")
    hub = ("search.trials=6", "backbone.name=timm/test_resnet", "backbone.weights=pretrained", "data.image_size=32")
    file = ("search.trials=1", f"backbone.weights={drivers_own / 'toy.safetensors'}", "scaling.workers=3")
    options = (*plain, *(hub if source == "hub" else file))
    own = {"FROSTLINE_CACHE": "cache", "HF_HUB_CACHE": "hub", "TORCH_HOME": "torch"}
    settings = {"HF_HUB_OFFLINE": "1"} | {name: str(drivers_own / folder) for name, folder in own.items()}
    assert [on_node(name, "ls", str(drivers_own)) for name in NODES] == [""] * 3
    answer(driver(cluster, SEARCH, str(tmp_path / "cluster" / "study"), *options, **settings))
    inline = SEARCH.replace("address=sys.argv[1]", 'inline=True, overrides=["scaling.workers=1"]')
    answer(driver(cluster, inline, str(tmp_path / "study"), *options, **settings))
    rows, wanted = (results.read_trials(tmp_path / study).to_pylist() for study in ("cluster/study", "study"))
    assert {row["status"] for row in rows} == {"complete"}
    assert {row["weights_hash"] for row in rows} == {row["weights_hash"] for row in wanted}
    if source == "hub":
        assert numbers(tmp_path / "cluster" / "study") == numbers(tmp_path / "study")
    used = {name for row in rows for name in row["node"].split(", ")}
    assert used == {*NODES} if source == "file" else used <= {*NODES}
    for name in used:
        assert len(on_node(name, "find", str(cache_root() / "weights"), "-name", "*.safetensors").split()) == 1


def trains(raylet: int) -> bool:
    """Whether a worker of Ray Train runs on the node."""
    below = psutil.Process(raylet).children(recursive=True)
    return any("RayTrainWorker" in " ".join(process.cmdline()) for process in below)


@pytest.mark.long
@needs_namespaces
@pytest.mark.fault(10)
def test_a_slow_network_changes_no_number(cluster: Cluster, tmp_path: Path) -> None:
    """256 kbit/s to and from each node."""
    options = (*PLAIN, "search.trials=3", "confirm.seeds=1")
    links = [node.link for node in cluster.nodes[1:] if node.link]
    for link in links:
        limit = ["root", "tbf", "rate", "256kbit", "burst", "16kb", "latency", "400ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", link, *limit], check=True)
    try:
        answer(driver(cluster, SEARCH, str(tmp_path / "slow" / "study"), *options))
    finally:
        for link in links:
            subprocess.run(["tc", "qdisc", "del", "dev", link, "root"], check=True)
    answer(driver(cluster, SEARCH, str(tmp_path / "fast" / "study"), *options))
    assert numbers(tmp_path / "slow" / "study") == numbers(tmp_path / "fast" / "study")


@pytest.mark.slow
@needs_namespaces
def test_nodes_that_were_killed_or_cut_off_come_back(cluster: Cluster) -> None:
    localcluster.kill("node1")
    localcluster.heal("node1")
    localcluster.cut("node3")
    assert localcluster.states(cluster)["node3"] == "cut"
    wait_until(lambda: not localcluster._registered(cluster)["node3"])
    localcluster.heal("node3")
    assert set(localcluster.states(localcluster._there()).values()) == {"alive"}


def test_the_commands_say_what_there_is_and_the_token_stays_secret(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "up"]) == 2
    assert f"a cluster is up: 3 nodes, its head at {cluster.address}" in capsys.readouterr().err
    assert main(["cluster", "status"]) == 0
    shown = capsys.readouterr().out
    for node in cluster.nodes:
        assert node.name in shown
        assert node.address in shown
    assert main(["cluster", "kill", "node9"]) == 2
    assert "'node9' is no node; there are head, node1, node2, node3" in capsys.readouterr().err
    token = localcluster.token_path()
    assert token.stat().st_mode & 0o777 == 0o600
    assert localcluster.root().stat().st_mode & 0o777 == 0o700
    for path in [localcluster.root() / "state.json", *Path(cluster.folder).glob("*.log")]:
        assert token.read_text() not in path.read_text()


@pytest.mark.fault(50)
def test_down_leaves_nothing(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert traces(cluster)
    assert main(["cluster", "down"]) == 0
    assert traces(cluster) == []
    assert main(["cluster", "down"]) == 0
    assert capsys.readouterr().out.splitlines() == ["took down 4 nodes, the head's included", "no cluster is up"]
    assert main(["cluster", "status"]) == 0
    assert main(["cluster", "heal", "node1"]) == 2
    assert "`frostline cluster up` starts one" in capsys.readouterr().err


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))


@pytest.mark.fault(50)
@pytest.mark.usefixtures("own_cache")
def test_a_node_that_does_not_start_leaves_nothing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_START_HOOK", "missing_module.hook")
    before = set(Path(tempfile.gettempdir()).glob("frostline-*"))
    with pytest.raises(NodeError, match=r"(?s)head .* did not start; it said:.*missing_module"):
        localcluster.up(2, 1)
    assert localcluster.current() is None
    assert not localcluster.root().exists()
    assert set(Path(tempfile.gettempdir()).glob("frostline-*")) == before


@pytest.mark.fault(50)
@pytest.mark.usefixtures("own_cache")
def test_down_cleans_up_after_an_up_that_was_killed() -> None:
    starting = subprocess.Popen([sys.executable, "-m", "frostline.cli", "cluster", "up", "--nodes", "2", "--cpus", "1"])

    def begun() -> bool:
        there = localcluster.current()
        return there is not None and there.nodes[0].pid > 0

    wait_until(begun)
    starting.send_signal(signal.SIGKILL)
    starting.wait()
    half = localcluster._there()
    assert traces(half)
    localcluster.down()
    assert traces(half) == []


@pytest.fixture
def alone(own_cache: None) -> Iterator[Cluster]:
    """One node beside the head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_timeout_ms", "1000")
        patch.setenv("RAY_health_check_failure_threshold", "4")
        yield localcluster.up(1, 2)
        localcluster.down()


LONG = (*PLAIN, "search.trials=8", "train.epochs=40", "confirm.seeds=1", "scaling.timeout_s=20")


def begun(cluster: Cluster, study: Path) -> subprocess.Popen:
    """A search that has committed a row."""
    searching = driver(cluster, SEARCH, str(study), *LONG)
    wait_until(lambda: committed(study) or searching.poll() is not None, 240)
    assert searching.poll() is None, searching.communicate()
    return searching


@pytest.fixture
def kept(own_cache: None, tmp_path: Path) -> Iterator[Cluster]:
    """One node beside a head that keeps its tables in Redis, where one that is started again finds them."""
    port = localcluster._free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as redis, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_REDIS_ADDRESS", f"127.0.0.1:{port}")
        yield localcluster.up(1, 2)
        localcluster.down()
        redis.terminate()


@pytest.mark.long
@pytest.mark.fault(16)
@pytest.mark.skipif(not shutil.which("redis-server"), reason="needs redis-server, from apt-get")
@needs_namespaces
def test_a_search_whose_head_is_back_in_time_goes_on(kept: Cluster, tmp_path: Path) -> None:
    """All of the head's processes end, and the driver is on a node, as where the head has no CPUs. Processes of all nodes see each other
    here, so that Ray has to be told which of them is the driver's."""
    study, node = tmp_path / "study", kept.nodes[1]
    here = f"from functools import partial; from frostline.connection import ray; ray.init = partial(ray.init, _node_ip_address={node.address!r})"
    searching = driver(kept, here + SEARCH, str(study), *LONG, entered=localcluster._entered(node))
    wait_until(lambda: committed(study) or searching.poll() is not None, 400)
    assert searching.poll() is None, searching.communicate()
    before = committed(study)
    localcluster.kill("head")
    time.sleep(5)
    assert searching.poll() is None, searching.communicate()
    (Path(kept.folder) / "head" / "ray_current_cluster").unlink()  # of a host's last head, which would count as running
    localcluster._started(localcluster._there(), kept.nodes[:1])
    answer(searching)
    each_row_once(study, before)
    assert {row["status"] for row in results.read_trials(study).to_pylist()} == {"complete"}


@pytest.fixture
def lossy(own_cache: None, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two nodes whose calls of some services fail, one in ten before they are sent and one in ten when they are answered; but those that
    run a method of an actor, as Ray does not send again what may have been done."""
    described = importlib.import_module(f"ray.core.generated.{request.param}_pb2").DESCRIPTOR.services_by_name
    methods = [
        f"{service.name}.grpc_client.{name}"
        for service in described.values()
        for name in service.methods_by_name
        if "PushTask" not in name
    ]
    odds = {"num_failures": -1, "req_failure_prob": 10, "resp_failure_prob": 10}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_testing_rpc_failure", json.dumps(dict.fromkeys(methods, odds)))
        yield localcluster.up(2, 1)
        localcluster.down()


@pytest.mark.long
@pytest.mark.fault(11)
@pytest.mark.parametrize(
    "lossy",
    ["gcs_service", "node_manager", "core_worker", "pubsub"],
    ids=["of the head", "of nodes", "of workers", "of who listens"],
    indirect=True,
)
def test_calls_that_fail_change_no_number(lossy: Cluster, tmp_path: Path) -> None:
    options = (*PLAIN, "search.trials=6", "confirm.seeds=1")
    searching = driver(lossy, SEARCH, str(tmp_path / "lossy" / "study"), *options)
    _, said = searching.communicate(timeout=300)
    assert searching.returncode == 0, said
    assert "RpcFailureManager" in said, "calls are made to fail"
    answer(driver(lossy, SEARCH.replace("address=sys.argv[1]", "inline=True"), str(tmp_path / "study"), *options))
    assert numbers(tmp_path / "lossy" / "study") == numbers(tmp_path / "study")


def each_row_once(study: Path, before: set[str]) -> None:
    rows = [row["trial_id"] for row in results.read_trials(study).to_pylist()]
    assert len(rows) == len(set(rows)) == 8 + 1
    assert before <= set(rows)


@pytest.mark.long
@pytest.mark.fault(6)
def test_a_search_whose_only_node_is_gone_says_so_and_goes_on_when_it_is_back(alone: Cluster, tmp_path: Path) -> None:
    study = tmp_path / "study"
    searching = begun(alone, study)
    localcluster.kill("node1")
    _, said = searching.communicate(timeout=120)
    assert searching.returncode == 1
    assert "PlacementError: a trial needs 1 CPUs and 0 GPUs on one node" in said
    before = committed(study)
    assert before
    localcluster.heal("node1")
    answer(driver(alone, SEARCH, str(study), *LONG))
    each_row_once(study, before)


@pytest.mark.long
@pytest.mark.fault(15)
def test_a_search_whose_head_is_gone_ends_and_goes_on_on_another_cluster(alone: Cluster, tmp_path: Path) -> None:
    study = tmp_path / "study"
    searching = begun(alone, study)
    localcluster.kill("head")
    searching.communicate(timeout=240)
    assert searching.returncode
    before = committed(study)
    assert before
    localcluster.down()
    answer(driver(localcluster.up(1, 2), SEARCH, str(study), *LONG))
    each_row_once(study, before)


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_without_namespaces_nodes_are_raylets_on_loopback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "missing", lambda: "network namespaces need root")
    try:
        assert main(["cluster", "up", "--nodes", "2", "--cpus", "1"]) == 0
        shown = capsys.readouterr().out
        assert "the nodes share this host's address: network namespaces need root" in shown
        assert "RAY_AUTH_TOKEN_PATH=" in shown
        assert localcluster.token_path().read_text() not in shown
        there = localcluster._there()
        assert f"frostline search JOB --address {there.address}" in shown
        assert len(landed(there)) == 2
        assert main(["cluster", "cut", "node2"]) == 2
        assert "node2 has no link of its own: network namespaces need root" in capsys.readouterr().err
        assert main(["cluster", "kill", "node2"]) == 0
        assert main(["cluster", "status", "--json"]) == 0
        assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["alive", "alive", "dead"]
    finally:
        localcluster.down()
    assert traces(there) == []


def greets(address: str, context: ssl.SSLContext | None) -> bool:
    """Whether gRPC answers there to who opens a connection so."""
    host, _, port = address.rpartition(":")
    opening = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # of HTTP/2, and no settings
    try:
        with socket.create_connection((host, int(port)), timeout=20) as opened:
            if context:
                context.set_alpn_protocols(["h2"])
                opened = context.wrap_socket(opened, server_hostname=host)
            with opened:
                opened.sendall(opening)
                return bool(opened.recv(1))
    except (ConnectionError, ssl.SSLError):
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_with_tls_only_those_with_a_certificate_are_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own: between all its processes, each of which shows who it is and asks the other. The token alone is not enough."""
    planned = localcluster.plan(1, 2, None)
    names = {*(node.address for node in planned.nodes), "127.0.0.1", "localhost"}
    of, other = (certified(tmp_path / name, *names) for name in ("of", "other"))
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_CA_CERT", of.authority)
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", of.certificate)
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", of.key)
    there = localcluster.up(1, 2, planned.subnet)
    try:
        answer(driver(there, SEARCH, str(tmp_path / "study"), *PLAIN, "search.trials=4"))
        assert {row["status"] for row in results.read_trials(tmp_path / "study").to_pylist()} == {"complete"}
        nameless, ours, strangers = (ssl.create_default_context(cafile=of.authority) for _ in range(3))
        ours.load_cert_chain(of.certificate, of.key)
        strangers.load_cert_chain(other.certificate, other.key)
        greeted = [greets(there.address, context) for context in (ours, nameless, strangers, None)]
        assert greeted == [True, False, False, False]
    finally:
        localcluster.down()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "0"], "give 1 to 200"),
        (["--nodes", "2", "--cpus", "0"], "give 1 or more"),
        (["--subnet", "8.8.8.0/24"], "--subnet 8.8.8.0/24"),
    ],
)
@pytest.mark.usefixtures("own_cache")
def test_what_cannot_be_made_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "up", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not localcluster.root().exists()
