"""The project's shape: what README, docs, jobs and the package must go on saying about each other."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from frostline.cli import main
from frostline.jobfile import load_job
from frostline.propose import Proposer, distributions
from frostline.results import SCHEMAS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
JOBS = sorted((ROOT / "jobs").glob("*.toml"))
MODULES = sorted(path.name for path in (ROOT / "platform" / "frostline").glob("*.py"))


def test_the_source_root_is_no_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert platform.python_version() == ".".join(map(str, sys.version_info[:3]))


def test_readme_lists_every_module_in_one_line() -> None:
    listed = re.findall(r"^\s+(\w+\.py)\s+\S", README, re.MULTILINE)
    assert sorted(listed) == MODULES


def test_readme_names_the_commands_that_set_everything_up() -> None:
    for command in ("make quickstart", "make test"):
        assert command in README
        target = command.split()[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "jobs").glob("*.md"),
        *(ROOT / "cluster").rglob("*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_shown_in_readme_and_docs_is_one() -> None:
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    shown = {match for page in pages for match in re.findall(r"^\s*frostline (\w+)", page, re.MULTILINE)}
    assert {"search", "plan", "results", "schema", "init"} <= shown
    for command in shown:
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_are_valid_and_say_what_to_expect(path: Path) -> None:
    job = load_job(path)
    assert job.name == path.stem
    header = path.read_text().split("\nname")[0]
    for word in ("Shows:", "Command:", "Time:", "Result:"):
        assert f"# {word}" in header, word
    assert re.search(rf"frostline (search|train) jobs/{re.escape(path.name)}", header)
    assert f"{path.stem}.toml" in (ROOT / "jobs" / "README.md").read_text()
    for name, arm in job.arms.items():
        assert distributions(arm, 8) or arm.strategy
        Proposer(job, name, 8, job.search.trials // len(job.arms)).ask()


def test_there_are_three_jobs() -> None:
    assert len(JOBS) >= 3
    assert "quickstart" in [path.stem for path in JOBS]


def test_results_are_read_without_torch_ray_and_optuna() -> None:
    script = (
        "import sys, frostline, frostline.results, frostline.jobfile, frostline.reference, frostline.compare_text\n"
    )
    script += "print([name for name in ('torch', 'ray', 'optuna', 'timm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_benchmark_says_how_to_run_it() -> None:
    for script in (ROOT / "benchmarks").glob("[a-z]*.py"):
        assert f"python benchmarks/{script.name}" in script.read_text()


def test_docs_describe_every_column() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    for table, schema in SCHEMAS.items():
        for column in schema.names:
            assert f"`{column}`" in page, f"{table}.{column}"
