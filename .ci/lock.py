"""requirements.lock and the bill of materials.

    python .ci/lock.py lock     # what this environment holds, with PyPI's hashes: requirements.lock
    python .ci/lock.py sbom     # the same as CycloneDX JSON, with licences: sbom.json

The lock is what pip would install of `frostline[test]` from PyPI in the versions that are installed here, and so were tested; local
indexes and pip's own settings are left out of it. It is for the Python and the kind of machine that made it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCK, SBOM = ROOT / "requirements.lock", ROOT / "sbom.json"
ENTRY = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+) \\\n    --hash=sha256:(?P<sha256>[0-9a-f]{64})$", re.M
)


def lock() -> None:
    """Ask pip what it would install, and write it down."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env["PIP_CONFIG_FILE"] = os.devnull
    frozen = subprocess.run(
        [*pip, "freeze", "--exclude-editable"], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        versions = Path(folder) / "versions.txt"
        versions.write_text("".join(line for line in frozen.stdout.splitlines(keepends=True) if "==" in line))
        wanted = ["--ignore-installed", "--constraint", str(versions), "--editable", f"{ROOT}[test]"]
        command = [*pip, "install", "--quiet", "--dry-run", "--report", "-", *wanted]
        report = json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)
    entries = sorted(entry(each) for each in report["install"] if not each["download_info"].get("dir_info"))
    made_for = f"Python {'.'.join(platform.python_version_tuple()[:2])}, {sys.platform} {platform.machine()}"
    head = f"# What frostline[test] was tested with; `make lock` writes it. {made_for}\n"
    LOCK.write_text(head + "".join(entries))


def entry(item: dict[str, Any]) -> str:
    """A package of pip's report, as pip reads it in a file of requirements."""
    about, sha256 = item["metadata"], item["download_info"]["archive_info"]["hashes"]["sha256"]
    name = re.sub(r"[-_.]+", "-", about["name"]).lower()
    return f"{name}=={about['version']} \\\n    --hash=sha256:{sha256}\n"


def sbom() -> None:
    """Write the lock as CycloneDX, with the licences of what is installed."""
    SBOM.write_text(json.dumps(bill(LOCK.read_text()), indent=1) + "\n")


def bill(text: str) -> dict[str, Any]:
    """CycloneDX 1.6 of a lock."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "name": "frostline", "version": metadata.version("frostline")}
        },
        "components": [
            {
                "type": "library",
                "name": found["name"],
                "version": found["version"],
                "purl": f"pkg:pypi/{found['name']}@{found['version']}",
                "hashes": [{"alg": "SHA-256", "content": found["sha256"]}],
                "licenses": licences(found["name"]),
            }
            for found in ENTRY.finditer(text)
        ],
    }


def licences(name: str) -> list[dict[str, Any]]:
    """What an installed package says of its licence: an expression, else classifiers, else a short text; empty where it says nothing."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return []
    if expression := about.get("License-Expression"):
        return [{"expression": expression}]
    named = [each.rpartition(" :: ")[2] for each in about.get_all("Classifier", []) if each.startswith("License :: ")]
    if not named and (said := about.get("License", "")) and len(said) < 80 and "\n" not in said:
        named = [said]
    return [{"license": {"name": each}} for each in named]


if __name__ == "__main__":
    {"lock": lock, "sbom": sbom}[sys.argv[1]]()
