"""SECURITY.md: a row for each line of the list, and the tests that it names; and those of the lines that are no one module's."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from _head import TOKEN, ray_head
from _s3 import s3_endpoint
from frostline import machine, results
from frostline.cli import main
from frostline.jobfile import JobError, as_toml, known_keys, parse_job
from frostline.rayenv import ClusterError, keep_token, private_folder, settings, shared_token
from frostline.submit import SubmissionError, check_address
from frostline.testing import image_folder, toy_job

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text()
SOURCES = sorted((ROOT / "platform" / "frostline").glob("*.py"))
LINES = 30


def test_every_line_has_a_row_and_every_test_that_it_names_is_there() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", PAGE, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, LINES + 1))
    tests = {
        f"tests/{path.name}::{node.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for number, _, held in rows:
        named = re.findall(r"`(tests/[^`]+)`", held)
        assert set(named) <= tests, f"line {number}"
        assert named or "](" in held or "**not held**: " in held, f"line {number} says not how it is held"


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Module and node, of all nodes of the package's syntax."""
    return [(path.name, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Module, name of what is called and the call, of all calls in the package."""
    return [(module, ast.unparse(node.func), node) for module, node in nodes() if isinstance(node, ast.Call)]


def imports() -> set[tuple[str, str]]:
    """Module, and what it imports: all packages, by their whole names."""
    found = set()
    for module, node in nodes():
        if isinstance(node, ast.Import):
            found |= {(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(module, f"{node.module}.{alias.name}") for alias in node.names}
    return found


def test_nothing_is_unpickled() -> None:
    """`pickle` itself is imported for the name of its error."""
    packages = {(module, name.partition(".")[0]) for module, name in imports()}
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "skops"}
    assert {each for each in packages if each[1] in forbidden} == {("weights.py", "pickle")}
    read = {"load", "loads", "Unpickler", "load_all"}
    used = [(module, name) for module, name, _ in calls()]
    assert not [each for each in used if each[1].rpartition(".")[0] == "pickle" and each[1].rpartition(".")[2] in read]
    loads = [(module, node) for module, name, node in calls() if name == "torch.load"]
    assert [module for module, _ in loads] == ["weights.py"]
    for _, node in loads:
        assert {each.arg: ast.unparse(each.value) for each in node.keywords}["weights_only"] == "True"
    arrays = [node for _, name, node in calls() if name in ("np.load", "numpy.load")]
    assert not [node for node in arrays if any(each.arg == "allow_pickle" for each in node.keywords)]


def test_no_text_is_run_and_no_shell_is_asked() -> None:
    names = {name for _, name, _ in calls()}
    assert not names & {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"}
    started = [node for _, name, node in calls() if name.startswith("subprocess.") or name == "os.posix_spawnp"]
    assert len(started) >= 7
    for node in started:
        assert not [each for each in node.keywords if each.arg == "shell"], ast.unparse(node)
        assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp), ast.unparse(node)
    allowed = {"backbone.py", "extras.py"}  # a job's python:MODULE:FUNCTION; the name of an extra
    assert {module for module, name, _ in calls() if name.endswith("import_module")} == allowed


def test_no_archive_is_unpacked_and_no_state_of_tune_restored() -> None:
    archives = ("tarfile", "zipfile", "gzip", "bz2", "lzma")
    assert {each for each in imports() if each[1].partition(".")[0] in archives} == {
        ("weights.py", "zipfile"),  # looks at what torch.save wrote
        ("idx.py", "gzip"),  # a stream, read as far as its header says
    }
    names = {name for _, name, _ in calls()}
    assert not [
        name for name in names if re.search(r"extractall$|unpack_archive$|Tuner\.restore$|ExperimentAnalysis$", name)
    ]


def test_a_job_brings_no_environment_and_no_code() -> None:
    """What may run is what `python:` names, which must be there already."""
    assert not [key for key in known_keys() if re.search("env|hook|exec|command|setup", key.rpartition(".")[2])]
    with pytest.raises(JobError, match="runtime_env: unknown key"):
        toy_job(Path("study"), ['runtime_env={pip=["evil"]}'])
    own = [
        (module, ast.unparse(node))
        for module, name, node in calls()
        for each in node.keywords
        if each.arg == "runtime_env"
    ]
    assert {module for module, _ in own} == {"connection.py", "submit.py"}


def test_importing_it_reaches_nothing_and_writes_nothing(tmp_path: Path) -> None:
    script = """
import os, socket, subprocess, sys
def refuse(event, arguments):
    if event.split(".")[0] in ("socket", "subprocess", "urllib", "ftplib", "smtplib"):
        raise SystemExit(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise SystemExit(f"wrote {arguments}")
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.remove", "os.rename"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
import frostline, frostline.jobfile, frostline.results, frostline.submit, frostline.nodes, frostline.localcluster, frostline.cli
print("nothing")
"""
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("nothing\n", 0), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ray_is_told_to_send_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    assert settings()["RAY_USAGE_STATS_ENABLED"] == "0"
    script = """
import frostline.tune
from ray._common.usage import usage_lib
print(usage_lib.usage_stats_enabled())
"""
    env = {name: value for name, value in os.environ.items() if name != "RAY_USAGE_STATS_ENABLED"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    templates = [path for path in (ROOT / "cluster").rglob("*") if path.is_file() and "ray start" in path.read_text()]
    sent = [
        path.name for path in templates if path.suffix != ".md" and "RAY_USAGE_STATS_ENABLED=0" not in path.read_text()
    ]
    assert sent == []


def test_the_wheel_holds_this_package_and_starts_nothing(tmp_path: Path) -> None:
    if util.find_spec("hatchling") is None:
        pytest.skip("the build backend is not installed: pip install hatchling")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"frostline", wheel.name.partition("-py3")[0] + ".dist-info"}
    modules = {name.partition("/")[2] for name in names if name.startswith("frostline/")}
    assert {path.name for path in SOURCES} <= modules
    assert {Path(name).suffix for name in modules} <= {".py", ".html", ".json", ".css", ".js", ".typed"}


SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22}|hf_[A-Za-z0-9]{34}|sk-[A-Za-z0-9]{32}|"
    r"xox[abp]-[0-9A-Za-z-]{10}|AIza[0-9A-Za-z_-]{35}|pypi-AgEI[A-Za-z]{6}|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def test_no_secret_lies_in_the_repository() -> None:
    assert SECRETS.search("x = 'AKIA" + "Q" * 16 + "'")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("no git here: what belongs to the repository is not known")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert len(files) > 200
    assert [str(path) for path in files if path.is_file() and SECRETS.search(path.read_text(errors="replace"))] == []


LEAST = {"ray": (2, 54), "torch": (2, 10), "pillow": (12, 3)}
"""Below these there are known holes."""


def test_versions_with_known_holes_cannot_be_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {need.name: need for need in map(Requirement, project["dependencies"])}
    for name, (major, minor) in LEAST.items():
        assert not wanted[name].specifier.contains(f"{major}.{minor - 1}.99"), name
        assert wanted[name].specifier.contains(metadata.version(name)), name


def lock() -> dict[str, tuple[str, str]]:
    """Version and SHA-256 of each package in requirements.lock."""
    text = (ROOT / "requirements.lock").read_text()
    entries = re.findall(r"^([a-z0-9-]+)==(\S+) \\\n    --hash=sha256:([0-9a-f]{64})$", text, re.MULTILINE)
    rest = re.sub(r"^([a-z0-9-]+)==(\S+) \\\n    --hash=sha256:([0-9a-f]{64})$", "", text, flags=re.MULTILINE)
    assert [line for line in rest.splitlines() if line and not line.startswith("#")] == [], "an entry without a hash"
    assert "://" not in text
    return {name: (version, sha256) for name, version, sha256 in entries}


def test_the_lock_holds_what_the_project_wants() -> None:
    locked = lock()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    extras = {name: [Requirement(text) for text in texts] for name, texts in project["optional-dependencies"].items()}
    waiting += extras["test"]
    seen: set[str] = set()
    while waiting:
        need = waiting.pop()
        if need.name == "frostline":
            waiting += [each for extra in need.extras - seen for each in extras[extra]]
            seen |= need.extras
            continue
        version, _ = locked[re.sub(r"[-_.]+", "-", need.name).lower()]
        assert need.specifier.contains(version), f"{need} and {version}: `make lock`"


def test_the_bill_of_materials_names_all_that_is_locked() -> None:
    spec = util.spec_from_file_location("lock", ROOT / ".ci" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := util.module_from_spec(spec))
    bill = module.bill((ROOT / "requirements.lock").read_text())
    found = {each["name"]: (each["version"], each["hashes"][0]["content"]) for each in bill["components"]}
    assert found == lock()
    assert all(each["purl"] == f"pkg:pypi/{each['name']}@{each['version']}" for each in bill["components"])
    told = {each["name"]: each["licenses"] for each in bill["components"]}
    assert told["ray"]
    assert told["numpy"]


@pytest.mark.parametrize("was", [None, 0o644])
def test_a_token_of_ours_is_read_by_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was: int | None
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    if was:
        token.parent.mkdir()
        token.write_text("one of Ray's")
        token.chmod(was)
        assert shared_token() == str(token)
        assert machine.look("here")["token_shared"] == str(token)
    keep_token()
    assert token.stat().st_mode & 0o777 == 0o600
    assert shared_token() is None
    assert len(said := token.read_text()) == (len("one of Ray's") if was else 64)
    keep_token()
    assert token.read_text() == said
    assert list(token.parent.iterdir()) == [token]
    if was is None:
        assert token.parent.stat().st_mode & 0o777 == 0o700


def test_rays_sessions_lie_where_nobody_else_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = private_folder().parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder().parent == folder
    folder.chmod(0o755)
    with pytest.raises(ClusterError, match="can be entered by others"):
        private_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ClusterError, match="or is theirs"):
        private_folder()


UNASKED = (
    "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, 10)"
)
LOCAL = """
import sys
from frostline.connection import cluster
import ray
with cluster(None) as wait:
    assert wait() is False
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
"""


def listeners(root: int) -> dict[str, set[str]]:
    """Addresses that a process and those that it started listen at, by the name of the process."""
    import psutil

    parent = psutil.Process(root)
    found: dict[str, set[str]] = {}
    for process in [parent, *parent.children(recursive=True)]:
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN:
                found.setdefault(process.name(), set()).add(each.laddr.ip.removeprefix("::ffff:"))
    return found


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for sockets, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="fl-") as folder:
        yield Path(folder)


def test_a_ray_of_our_own_is_reached_from_this_machine_and_with_its_token_only(tmp_path: Path, short: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "TMPDIR": str(short)}
    command = [sys.executable, "-c", LOCAL]
    with subprocess.Popen(
        command, env=env, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ray:
        assert ray.stdin
        assert ray.stdout
        address = ray.stdout.readline().strip()
        found = listeners(ray.pid)
        asked = {}
        for mode in ("disabled", "token"):
            asking = [sys.executable, "-c", UNASKED, address]
            done = subprocess.run(asking, env=env | {"RAY_AUTH_MODE": mode}, capture_output=True, text=True)
            asked[mode] = done.returncode
        ray.communicate("\n")
    assert ray.returncode == 0
    assert {"gcs_server", "raylet"} <= found.keys()
    assert set().union(*found.values()) <= {"127.0.0.1", "::1"}, found
    assert asked["token"] == 0
    assert asked["disabled"] != 0
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    (folder,) = short.glob("frostline-user-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert next((folder / "ray").glob("session_2*"))


JOB = """
name = "found"
data = { path = "digits", image_size = 16, per_class = 5 }
backbone = { name = "python:frostline.testing:toy_backbone", weights = "random" }
train = { epochs = 1 }
search = { trials = 1 }
confirm = { seeds = 0 }
[arms.probe]
strategy = "linear_probe"
"""


@pytest.mark.slow
def test_a_cluster_that_is_open_is_refused_unless_the_user_says_so(tmp_path: Path) -> None:
    """Its head has an address that Ray does not take for loopback; one process has a token, which nobody asks for, one has none."""
    for name in ("head", "another"):
        (tmp_path / name).mkdir()
    (tmp_path / "job.toml").write_text(JOB)
    with ray_head(tmp_path / "head", host="127.0.0.2", token=False) as head:
        refused = f"the cluster at {head.address} lets in whoever reaches it"
        for mode in ("disabled", "token"):
            done = head.run(tmp_path, "search", "job.toml", "--address", head.address, RAY_AUTH_MODE=mode)
            assert done.returncode == 2, done.stdout
            assert f"frostline: {refused}" in done.stdout
            assert "Traceback" not in done.stdout
        assert not (tmp_path / "results").exists()
        done = head.run(
            tmp_path, "search", "job.toml", "--address", head.address, "--allow-open-cluster", RAY_AUTH_MODE="disabled"
        )
        assert done.returncode == 0, done.stdout
        assert f"warning: {refused}" in done.stdout
        assert results.read_job(tmp_path / "results" / "found")["facts"]["open_cluster"] is True
        done = head.run(tmp_path, "doctor", "--address", head.address, RAY_AUTH_MODE="disabled")
        assert done.returncode == 1
        assert "asks for no token: whoever reaches it may join the cluster and run code" in done.stdout
    with ray_head(tmp_path / "another", host="127.0.0.2") as head:
        done = head.run(tmp_path, "search", "job.toml", "results=closed", "--address", head.address)
        assert done.returncode == 0, done.stdout
        assert "open_cluster" not in results.read_job(tmp_path / "closed")["facts"]


KEY, SECRET = "canary-of-a-key", "canary+secret/of+storage"


def test_no_secret_gets_into_a_study_or_what_is_said_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images and activations in S3, its keys and a token in the environment of a search; then a mistake in every place."""
    images, canaries = image_folder(tmp_path / "images"), (KEY, SECRET, TOKEN)
    with s3_endpoint() as (place, client):
        client.create_bucket(Bucket="pets")
        for path in images.rglob("*.png"):
            client.put_object(Bucket="pets", Key=f"all/{path.relative_to(images)}", Body=path.read_bytes())
        raw = toy_job(tmp_path / "study", ["search.trials=2"]).model_dump(mode="json", exclude_unset=True)
        raw["data"] = {"path": "s3://pets/all", "image_size": 16, "per_class": 4}
        raw["features"] = {"path": "s3://pets/features", "cache": "all"}
        (tmp_path / "job.toml").write_text("\n".join(as_toml(raw)))
        env = {"AWS_ENDPOINT_URL": f"http://{place}", "AWS_REGION": "us-east-1", "RAY_AUTH_TOKEN": TOKEN}
        for name, value in {**env, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}.items():
            monkeypatch.setenv(name, value)
        elsewhere = ["features.path=s3://nobody/x", f"results={tmp_path / 'other'}"]
        for mistake in ([], ["data.path=s3://pets/none"], elsewhere, ["results=/proc/x"]):
            status = main(["search", str(tmp_path / "job.toml"), "--inline", *mistake])
            said = "".join(capsys.readouterr())
            assert (status != 0) is bool(mistake), said
            assert not [canary for canary in canaries if canary in said]
        assert client.list_objects_v2(Bucket="pets", Prefix="features/")["KeyCount"]
    written = [path for path in (tmp_path / "study").rglob("*") if path.is_file()]
    assert {"job.json", "report.html", "bundle.json", "lease.json"} <= {path.name for path in written}
    rows = json.dumps(results.read_trials(tmp_path / "study").to_pylist(), default=str)
    for canary in canaries:
        assert [path for path in written if canary.encode() in path.read_bytes()] == []
        assert canary not in rows


PASSWORD = "hunter2canary"


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("data.path", f"s3://key:{PASSWORD}@bucket/x"),
        ("features.path", f"s3://key:{PASSWORD}@bucket/x?region=eu"),
        ("scaling.checkpoints", f"abfs://box@account/x?client_secret={PASSWORD}"),
        ("features.cache", f"s3://key:{PASSWORD}@bucket/x"),  # no address belongs there
    ],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(
    tmp_path: Path, key: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    override = f"{key}={address}"
    assert main(["search", str(tmp_path / "job.toml"), override, f"results={tmp_path / 'study'}", "--inline"]) == 2
    said = "".join(capsys.readouterr())
    assert key in said
    assert "***" in said
    assert PASSWORD not in said
    assert not (tmp_path / "study").exists()


def test_nor_is_one_repeated_where_no_job_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SubmissionError, match=r"https://\*\*\*@head:8265: leave the credentials out"):
        check_address(f"https://me:{PASSWORD}@head:8265")
    with pytest.raises(SystemExit):
        main(["results", "study", f"s3://me:{PASSWORD}@bucket"])
    assert main(["features", "list", f"ftp://me:{PASSWORD}@host/x"]) == 2
    assert main(["predict", "no-bundle", f"s3://me:{PASSWORD}@bucket/x", "--out", "/nowhere"]) == 2
    assert PASSWORD not in "".join(capsys.readouterr())


NASTY = "\x1b]0;owned\x07\x1b[2J<b>x</b>"


def test_no_name_commands_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = image_folder(tmp_path / "images", classes=("bars", NASTY.replace("/", "")))
    broken = images / "bars" / f"{NASTY.replace('/', '')}.png"
    broken.write_bytes(b"no image")
    job = toy_job(
        tmp_path / "study", ["search.trials=1", "confirm.seeds=1"], data={"path": str(images), "image_size": 16}
    )
    text = "\n".join(as_toml(job.model_dump(mode="json", exclude_unset=True)))
    (tmp_path / "job.toml").write_text(text)
    assert main(["search", str(tmp_path / "job.toml"), "--inline"]) == 2
    said = "".join(capsys.readouterr())
    assert "owned" in said
    broken.unlink()
    for command in (["plan", "job.toml"], ["search", "job.toml", "--inline"]):
        assert main([command[0], str(tmp_path / command[1]), *command[2:]]) == 0
        said += "".join(capsys.readouterr())
    for command in ("results", "compare"):
        assert main([command, str(job.folder)]) == 0
        said += "".join(capsys.readouterr())
    assert main(["search", str(tmp_path / f"{NASTY.replace('/', '')}.toml")]) == 2
    said += "".join(capsys.readouterr())
    assert not set(said) & {"\x1b", "\x07", "\r", "\x9b"}


@pytest.mark.parametrize("name", ["../x", "/etc/x", ".hidden", "a/b", "a b", "", "x" * 65, "é", "a\n"])
def test_a_name_is_a_name(name: str) -> None:
    raw: dict[str, Any] = {"name": name, "data": {"path": "digits"}, "arms": {"a": {"strategy": "full"}}}
    with pytest.raises(JobError, match="a name is 1 to 64 letters"):
        parse_job(raw)
    raw = {"name": "x", "data": {"path": "digits"}, "arms": {name: {"strategy": "full"}}}
    with pytest.raises(JobError, match="a name is 1 to 64 letters"):
        parse_job(raw)
