"""What every test gets: its own data cache, one thread, and no look at the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from frostline.backbone import Backbone, load_backbone
from frostline.spec import BackboneSpec
from frostline.testing import TOY_BACKBONE

# The machine may be busy: no example has a deadline. In CI the examples are the same in every run; elsewhere they are new.
settings.register_profile(
    "frostline", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("frostline")


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
