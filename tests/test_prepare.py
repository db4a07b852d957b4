"""What is settled before a study: sizes, paths, facts; and where it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frostline.backbone import BackboneError
from frostline.prepare import prepare
from frostline.spec import Resources
from frostline.testing import image_folder, toy_job
from frostline.versions import versions
from frostline.world import World, autocast_dtype, find_device


def test_a_prepared_job_has_nothing_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "shapes")
    ready = prepare(toy_job(Path("study"), data={"path": "shapes"}))
    assert ready.job.data.path == str(tmp_path / "shapes")
    assert ready.job.data.image_size == 16
    assert ready.job.folder == tmp_path / "study"
    facts = ready.facts
    assert facts["classes"] == ["bars", "discs"]
    assert facts["stages"] == ["stem", "block1", "block2"]
    assert facts["n_train"] + facts["n_val"] + facts["n_test"] == 24
    assert len(facts["versions"]["code"]) == 12


def test_the_feature_store_lies_beside_the_study_unless_the_job_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def path(*overrides: str) -> str | None:
        return prepare(toy_job(Path("studies/one"), overrides)).job.features.path

    assert path() == str(tmp_path / "studies" / "features")
    assert path("features.path=mine") == str(tmp_path / "mine")
    assert path("features.path=file:///shared/features") == "file:///shared/features"
    with pytest.raises(ValueError, match="no file system is known for ftp://"):
        path("features.path=ftp://host/features")


def test_a_head_stands_only_where_the_backbone_can_be_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = ['arms.freeze.space."head.depth"="all"']
    prepare(toy_job(tmp_path, searched))
    there = dict.fromkeys((1, 3), "there")
    monkeypatch.setattr("frostline.prepare.cuts_of", lambda backbone, size: there)
    monkeypatch.setattr(
        "frostline.prepare.cuts_at", lambda backbone, size, depths: {i: "there" for i in depths if i in there}
    )
    for options in (searched, ["head.depth=2"], ['arms.freeze.space."head.depth"=2']):
        with pytest.raises(BackboneError, match=r"no head can stand there; it can after these: 1, 3"):
            prepare(toy_job(tmp_path, options))
    prepare(toy_job(tmp_path, ['arms.freeze.space."head.depth"=[1, 3]']))


def test_facts_change_with_what_they_stand_for(tmp_path: Path) -> None:
    first = prepare(toy_job(tmp_path, data={"path": str(image_folder(tmp_path / "a"))})).facts
    other = prepare(toy_job(tmp_path, data={"path": str(image_folder(tmp_path / "b", per_class=13))})).facts
    assert first["data_hash"] != other["data_hash"]
    assert first["weights_hash"] == other["weights_hash"]
    reseeded = prepare(toy_job(tmp_path, ["seed=1"], data={"path": str(tmp_path / "a")})).facts
    assert reseeded["data_hash"] == first["data_hash"]
    assert reseeded["split_hash"] != first["split_hash"]


def test_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert find_device("auto").type in ("cpu", "mps")
        with pytest.raises(ValueError, match=r"resources\.device = 'cuda'"):
            find_device("cuda")
    assert autocast_dtype("auto", torch.device("cpu")) is None
    assert autocast_dtype("bf16", torch.device("cpu")) is torch.bfloat16


def test_a_world_has_the_threads_of_the_job() -> None:
    World.here(Resources(threads=2))
    assert torch.get_num_threads() == 2


PEAKS = """
import torch
from frostline.world import peak_mib, reset_peak
cpu = torch.device("cpu")
reset_peak(cpu)
before = peak_mib(cpu)
big = torch.ones(64 << 18)  # 64 MiB
held = peak_mib(cpu)
del big
reset_peak(cpu)
print(held - before, peak_mib(cpu) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is reset through /proc")
def test_peak_memory_is_of_what_ran_since_the_reset() -> None:
    """In a fresh process: here, memory that earlier tests have freed would be used again."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    held, after = map(float, done.stdout.split())
    assert 60 < held < 80
    assert after < 20


def test_versions_name_what_computes() -> None:
    assert {"python", "torch", "ray", "optuna", "frostline", "code"} <= set(versions())
