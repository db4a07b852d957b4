"""The templates in cluster/, held to Ray's own validator, to KubeRay's fields, to pyproject.toml and to the command line.

KubeRay's own schemas are not part of this repository. What is here of them, the names of fields, was written by hand from its
API reference for the fields that the templates use or may sensibly use; a real `kubectl apply` checks more.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from frostline import __version__, network, results
from frostline.cli import build_parser
from frostline.testing import TOY_BACKBONE
from test_network import needs_namespaces

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAUNCHERS = sorted((CLUSTER / "launcher").glob("*.yaml"))

CLUSTER_FIELDS = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"),
    *("gcsFaultToleranceOptions", "headServiceAnnotations", "suspend", "managedBy"),
}
AUTOSCALER_FIELDS = {
    *("version", "idleTimeoutSeconds", "upscalingMode", "resources", "image", "imagePullPolicy", "env", "envFrom"),
    *("volumeMounts", "securityContext"),
}
GROUP_FIELDS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts", "rayStartParams"),
    *("template", "suspend", "scaleStrategy"),
}
HEAD_FIELDS = {"rayStartParams", "template", "serviceType", "headService", "enableIngress"}
REDIS_FIELDS = {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"}
JOB_FIELDS = {
    *("entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"),
    *(
        "activeDeadlineSeconds",
        "runtimeEnvYAML",
        "submissionMode",
        "clusterSelector",
        "submitterPodTemplate",
        "metadata",
    ),
    *("jobId", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "suspend", "deletionStrategy"),
}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def merged(base: Any, patch: Any) -> Any:
    """A JSON merge patch; see RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    base = copy.deepcopy(base) if isinstance(base, dict) else {}
    return base | {key: merged(base.get(key), value) for key, value in patch.items()}


def ray_clusters() -> dict[str, dict[str, Any]]:
    """The specs of Ray clusters in cluster/kuberay, the variant with Redis included."""
    (plain,) = documents(CLUSTER / "kuberay" / "raycluster.yaml")
    (job,) = documents(CLUSTER / "kuberay" / "rayjob.yaml")
    (patch,) = documents(CLUSTER / "kuberay" / "head-redis.yaml")
    return {"plain": plain["spec"], "job": job["spec"]["rayClusterSpec"], "redis": merged(plain, patch)["spec"]}


def check_pod(template: dict[str, Any], container: str) -> dict[str, Any]:
    """That a pod's mounts have volumes and its requests and limits agree; its container."""
    (found,) = template["spec"]["containers"]
    assert found["name"] == container
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in found["volumeMounts"]} == set(volumes)
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == "frostline"
    places = {mount["name"]: mount["mountPath"] for mount in found["volumeMounts"]}
    assert {"name": "FROSTLINE_CACHE", "value": places["cache"]} in found["env"]
    assert found["resources"]["limits"] == found["resources"]["requests"]
    assert template["spec"]["restartPolicy"] == "Never", (
        "autoscaler v2 wants nodes that do not come back under their name"
    )
    return found


@pytest.mark.parametrize("name", ["plain", "job", "redis"])
def test_a_ray_cluster_has_kuberays_fields_a_token_and_gpu_workers_that_scale(name: str) -> None:
    spec = ray_clusters()[name]
    assert set(spec) <= CLUSTER_FIELDS
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER_FIELDS
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert set(head) <= HEAD_FIELDS
    assert set(workers) <= GROUP_FIELDS
    assert head["rayStartParams"] == {"num-cpus": "0"}, "strings, as the operator makes flags of them"
    assert 1 <= workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    images = [check_pod(head["template"], "ray-head")["image"], check_pod(workers["template"], "ray-worker")["image"]]
    assert images == [f"REGISTRY/frostline:{__version__}"] * 2
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_job_has_kuberays_fields_and_begins_again_where_it_was() -> None:
    (job,) = documents(CLUSTER / "kuberay" / "rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= JOB_FIELDS
    assert job["spec"]["backoffLimit"] > 0
    given = search_of(job["spec"]["entrypoint"])
    assert given.address == "auto"
    (mount,) = [
        mount["mountPath"]
        for mount in job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        if mount["name"] == "shared"
    ]
    kept = dict(item.split("=") for item in given.overrides)
    assert all(path.startswith(f"{mount}/") for path in (given.job, kept["results"], kept["features.path"]))


def test_both_kuberay_files_describe_one_cluster() -> None:
    assert ray_clusters()["plain"] == ray_clusters()["job"]


def test_the_redis_variant_finds_its_redis_and_its_password() -> None:
    service, stateful = documents(CLUSTER / "kuberay" / "redis.yaml")
    options = ray_clusters()["redis"]["gcsFaultToleranceOptions"]
    assert set(options) <= REDIS_FIELDS
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == stateful["spec"]["selector"]["matchLabels"]
    secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == secret
    making = f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}="
    assert making in (CLUSTER / "kuberay" / "README.md").read_text()
    assert not any(document["kind"] == "Secret" for document in documents(CLUSTER / "kuberay" / "redis.yaml"))


def test_the_shared_volume_is_the_one_that_is_mounted() -> None:
    (claim,) = documents(CLUSTER / "kuberay" / "storage.yaml")
    assert (claim["kind"], claim["metadata"]["name"]) == ("PersistentVolumeClaim", "frostline")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_files_pass_rays_validator(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_launcher_files_that_are_wrong_do_not_pass() -> None:
    config = yaml.safe_load(LAUNCHERS[0].read_text())
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config({**config, "max_worker": 1}))


def test_the_slurm_script_is_bash_and_its_ray_command_is_rays() -> None:
    script = CLUSTER / "slurm" / "frostline.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    joined = script.read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^srun .*? ray symmetric-run (.*)$", joined, re.MULTILINE)
    ours, _, entrypoint = command.partition(" -- ")
    filled = ours.replace("$SLURM_JOB_NUM_NODES", "4").replace("$address", "10.0.0.1:6379")
    assert curate_and_validate_ray_start_args(shlex.split(filled)) == []
    given = search_of(entrypoint.replace('"$@"', "job.toml search.trials=400"))
    assert (given.job, given.overrides, given.address) == ("job.toml", ["search.trials=400"], "$address")


def test_the_slurm_script_says_how_it_is_called_and_leaves_no_token(tmp_path: Path) -> None:
    script = str(CLUSTER / "slurm" / "frostline.sbatch")
    done = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text("")
    given = {"FROSTLINE_VENV": str(tmp_path), "SLURM_JOB_ID": "7", "USER": "me", "SLURM_JOB_NODELIST": "n[1-4]"}
    done = subprocess.run(
        ["bash", script, "job.toml"], cwd=tmp_path, env=os.environ | given, capture_output=True, text=True
    )
    assert done.returncode != 0, "there is no scontrol here"
    assert not list(tmp_path.glob(".frostline-token-*"))


def search_of(command: str) -> Any:
    """What Frostline's own parser makes of a search command."""
    program, *arguments = shlex.split(command)
    assert program == "frostline"
    given = build_parser().parse_args(arguments)
    assert given.run.__name__ == "_search"
    return given


def test_every_frostline_command_shown_is_one() -> None:
    shown = []
    for path in FILES:
        text = path.read_text().replace("\\\n", " ")
        shown += re.findall(r"^\s*(frostline (?!:)[a-z].*?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert len(shown) > 5
    for command in shown:
        build_parser().parse_args(shlex.split(command)[1:])


def test_versions_are_those_of_the_project() -> None:
    wanted = next(item for item in PROJECT["dependencies"] if item.startswith("ray["))
    lowest = re.search(r">=([\d.]+)", wanted).group(1)
    for path in FILES:
        text = path.read_text()
        for found in re.findall(
            r"rayproject/ray:([\d.]+)-py|==(2[\d.]+)\"|rayVersion: \"([\d.]+)\"|TAG=([\d.]+)-py", text
        ):
            assert "".join(found) == f"{lowest}.0", f"{path.name}: {''.join(found)}"
        for minor in re.findall(r"-py3(\d+)|python3\.(\d+)|Python 3\.(\d+)", text):
            assert f">=3.{''.join(minor)}" == PROJECT["requires-python"], path.name
        for found in re.findall(r"REGISTRY/frostline:([\w.]+)", text):
            assert found == __version__, path.name
        for extras in re.findall(r"frostline\[([\w,]+)\]", text):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), path.name
    assert int(ray.__version__.split(".")[0]) == int(lowest.split(".")[0])


def test_every_folder_has_a_readme_that_names_its_files_and_cluster_readme_names_every_folder() -> None:
    overview = (CLUSTER / "README.md").read_text()
    for folder in [path for path in CLUSTER.iterdir() if path.is_dir()]:
        assert f"({folder.name}/README.md)" in overview
        for path in set(folder.iterdir()) - {folder / "README.md"}:
            assert path.name in (folder / "README.md").read_text(), path
    for path in FILES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()) if path.suffix == ".md" else []:
            assert (path.parent / target).exists(), f"{path} links to {target}"


SRUN = """#!/bin/sh
# two nodes, each with the network, host name and processes of its own
shift
(ip netns exec fl-slurm-2 "$0-on" node2 "$@") &
"$0-on" node1 "$@"
status=$?
wait
exit $status
"""
ON = """#!/bin/sh
exec unshare --uts --pid --fork --mount-proc --kill-child sh -c 'echo "$0" >/proc/sys/kernel/hostname; exec "$@"' "$@"
"""
TOY = f"""
name = "toy"
[data]
path = "digits"
image_size = 16
per_class = 10
[backbone]
name = "{TOY_BACKBONE}"
weights = "random"
[train]
epochs = 20
[search]
trials = 8
[confirm]
seeds = 2
[arms.freeze]
strategy = "freeze_depth"
[arms.freeze.space]
"freeze.depth" = "all"
"train.lr" = {{ low = 1e-4, high = 1e-2, log = true }}
"""


@pytest.mark.slow
@needs_namespaces
def test_the_slurm_script_runs_a_search_on_two_nodes(tmp_path: Path) -> None:
    """All of it but Slurm: `scontrol` and `srun` are scripts that know two nodes on this host."""
    bridge, spaces = "fl-slurm", ("fl-slurm-1", "fl-slurm-2")
    subnet = network.free_subnet()
    names = {"node1": str(subnet[11]), "node2": str(subnet[12])}
    programs = {"scontrol": "#!/bin/sh\nprintf 'node1\\nnode2\\n'\n", "srun": SRUN, "srun-on": ON}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.toml").write_text(TOY)
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FROSTLINE_VENV": sys.prefix,
        "FROSTLINE_CACHE": str(tmp_path / "cache"),
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="fl-slurm-"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "USER": "me",
    }
    network.make_bridge(bridge, subnet)
    try:
        for space, name in zip(spaces, names, strict=True):
            network.make_namespace(space, f"{space}-0", bridge, names[name], subnet, names)
        done = subprocess.run(
            [*network.enter(spaces[0], "node1"), "bash", str(CLUSTER / "slurm" / "frostline.sbatch"), "job.toml"],
            cwd=tmp_path,
            env=os.environ | given,
            capture_output=True,
            text=True,
        )
    finally:
        for space in spaces:
            network.remove_namespace(space, f"{space}-0")
        network.remove_bridge(bridge)
        shutil.rmtree(given["RAY_TMPDIR"])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read_trials(tmp_path / "results" / "toy").to_pylist()
    assert len(rows) == 8 + 2
    assert {row["node"] for row in rows} == {"node1", "node2"}
    assert not list(tmp_path.glob(".frostline-token-*"))
