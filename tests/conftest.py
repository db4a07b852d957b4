"""What every test gets: its own data cache, one thread, and no look at the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from _faults import Found, page
from frostline.backbone import Backbone, load_backbone
from frostline.spec import BackboneSpec
from frostline.testing import TOY_BACKBONE

# The machine may be busy: no example has a deadline. In CI the examples are the same in every run; elsewhere they are new.
settings.register_profile(
    "frostline", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("frostline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", metavar="PATH", help="write there which faults were withstood")
    parser.addoption("--kills", type=int, default=10, help="how often the driver of a study is killed")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--faults"):
        config.pluginmanager.register(FaultPage(Path(path)))


class FaultPage:
    """Gathers what the tests of each fault came to."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[int, Found]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report: pytest.TestReport = yield  # pyright: ignore[reportReturnType] (what hooks are sent)
        for number in {number for mark in item.iter_markers("fault") for number in mark.args}:
            _note(self.found.setdefault(number, Found()), report)
        return report

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(page(self.found, self.path.read_text() if self.path.exists() else ""))


def _note(found: Found, report: pytest.TestReport) -> None:
    if report.failed:
        found.red.append(report.nodeid)
    elif report.skipped:
        found.skipped.append(str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr))
    elif report.when == "call":
        found.held.append(report.nodeid)
        found.figures += [str(figure) for name, figure in report.user_properties if name == "figure"]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _torch_as_it_starts() -> None:
    """What a trial sets for its process, set back; one thread, as a trial has by default."""
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    return tmp_path / "study"


@pytest.fixture(scope="module")
def toy() -> Backbone:
    """The toy backbone."""
    return load_backbone(BackboneSpec(name=TOY_BACKBONE, weights="random"), image_size=16)
