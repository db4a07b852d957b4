"""Files of a job's that one machine has, brought to others: once, whole, and only as they were."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision

import frostline
from frostline import backbone as backbones
from frostline.backbone import load_backbone, parcels_of
from frostline.bundle import load_bundle
from frostline.cache import cache_root
from frostline.files import DataError
from frostline.spec import BackboneSpec
from frostline.staging import Parcel, bring, parcel, place_of
from frostline.testing import ToyNet, text_encoder, toy_training
from frostline.tokens import load_tokenizer

TOY = "python:frostline.testing:toy_backbone"
ELSEWHERE = Path("/nowhere/on/this/node")
SLOW_S = 0.3  # to read, so that two processes are at it at once

Read = Callable[[str, int], bytes]


@pytest.fixture(autouse=True)
def _as_a_node_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the cache, nothing brought, no hub that answers, no backbone loaded."""
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for proxy in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process begins."""
    monkeypatch.setattr("frostline.staging._PLACES", {})
    backbones._load.cache_clear()
    load_tokenizer.cache_clear()


@pytest.fixture
def weights(tmp_path: Path) -> Parcel:
    """A file of 1 MB that only the driver has."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "weights.pt").write_bytes(os.urandom(1 << 20))
    return away(parcel("weights.pt", tmp_path / "driver", ["weights.pt"], "weights.pt"))


def away(packed: Parcel) -> Parcel:
    """The same, as a node sees it that has no such folder."""
    return replace(packed, folder=ELSEWHERE / packed.folder.relative_to("/"))


def from_driver(path: str, offset: int, size: int = 300_000) -> bytes:
    """What it has of a file that is `away`."""
    with (Path("/") / Path(path).relative_to(ELSEWHERE)).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def refused(path: str, offset: int) -> bytes:
    raise AssertionError(f"{path} need not be read")


def sha256(path: Path | None) -> str:
    assert path is not None
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_a_node_has_under_the_drivers_path_is_used_there(tmp_path: Path) -> None:
    (tmp_path / "shared.pt").write_bytes(b"seen by all")
    bring([parcel("shared.pt", tmp_path, ["shared.pt"], "shared.pt")], refused)
    assert place_of("shared.pt") == tmp_path / "shared.pt"
    assert not cache_root().exists()
    assert place_of("other.pt") is None


def test_a_file_of_that_path_with_another_content_is_not_what_was_meant(tmp_path: Path) -> None:
    for name in ("driver", "node"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.pt").write_text(f"those of the {name}")
    packed = parcel("weights.pt", tmp_path / "driver", ["weights.pt"], "weights.pt")
    read = (tmp_path / "driver" / "weights.pt").read_bytes()
    bring([replace(packed, folder=tmp_path / "node")], lambda _, offset: read[offset:])
    found = place_of("weights.pt")
    assert found is not None
    assert found.read_text() == "those of the driver"
    assert found.is_relative_to(cache_root())


def test_what_is_lacking_is_brought_in_pieces_and_found_the_next_time(weights: Parcel) -> None:
    pieces: list[int] = []

    def read(path: str, offset: int) -> bytes:
        pieces.append(offset)
        return from_driver(path, offset)

    bring([weights], read)
    assert pieces == [0, 300_000, 600_000, 900_000, 1 << 20]
    assert sha256(place_of("weights.pt")) == weights.files["weights.pt"]
    bring([weights], refused)


def _bring_noting(packed: Parcel, log: Path) -> None:
    def read(path: str, offset: int) -> bytes:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {offset}\n")
        time.sleep(SLOW_S)
        return from_driver(path, offset)

    bring([packed], read)
    assert sha256(place_of(packed.name)) == packed.files["weights.pt"]


def test_of_two_processes_at_once_one_brings_it(tmp_path: Path, weights: Parcel) -> None:
    log, context = tmp_path / "log", multiprocessing.get_context("fork")
    processes = [context.Process(target=_bring_noting, args=(weights, log)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    readers = {line.split()[0] for line in log.read_text().splitlines()}
    assert len(readers) == 1
    assert len(log.read_text().splitlines()) == 5


def test_where_one_is_killed_over_it_the_next_one_brings_it(tmp_path: Path, weights: Parcel) -> None:
    log, context = tmp_path / "log", multiprocessing.get_context("fork")
    first = context.Process(target=_bring_noting, args=(weights, log))
    first.start()
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert first.is_alive()
        time.sleep(0.01)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    (folder,) = (cache_root() / "weights").iterdir()
    assert not (folder / "weights.pt").exists()
    bring([weights], from_driver)
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "weights.pt"]


@pytest.mark.parametrize("fault", ["torn", "changed", "gone"])
def test_a_copy_that_is_torn_or_changed_is_brought_anew(weights: Parcel, fault: str) -> None:
    bring([weights], from_driver)
    found = place_of("weights.pt")
    assert found is not None
    whole = found.read_bytes()
    if fault == "gone":
        found.unlink()
    else:
        found.write_bytes(whole[:-1] if fault == "torn" else whole[:-1] + bytes([whole[-1] ^ 1]))
    bring([weights], from_driver)
    assert found.read_bytes() == whole


def test_what_changes_beside_the_driver_is_refused_and_not_kept(tmp_path: Path, weights: Parcel) -> None:
    (tmp_path / "driver" / "weights.pt").write_bytes(b"trained on")
    with pytest.raises(
        DataError, match=rf"{ELSEWHERE}.*/driver/weights\.pt: what .* was sent of it .* start again once"
    ):
        bring([weights], from_driver)
    assert [path.name for path in (cache_root() / "weights").rglob("*") if path.is_file()] == ["lock"]
    assert place_of("weights.pt") is None


# --- what a backbone is loaded from


def same_elsewhere(spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch, *, size: int | None = None) -> list[Parcel]:
    """Load it as the driver does, and again as a node that has nothing but what is brought; answers that."""
    own = load_backbone(spec, image_size=size)
    packed = [away(each) for each in parcels_of(spec, own)]
    monkeypatch.setenv("FROSTLINE_CACHE", str(cache_root().parent / "node"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nowhere")
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    forget(monkeypatch)
    bring(packed, from_driver)
    brought = load_backbone(spec, image_size=size)
    assert brought is not own
    assert brought.weights_hash == own.weights_hash
    assert brought.stages_hash == own.stages_hash
    assert (brought.inputs, brought.size, brought.name) == (own.inputs, own.size, own.name)
    assert (brought.classifier is None) == (own.classifier is None)
    if own.classifier and brought.classifier:
        assert torch.equal(own.classifier[0], brought.classifier[0])
    assert brought.from_hub is None, "it is not sent on"
    return packed


def in_hub(tmp_path: Path, repository: str, fill: Callable[[Path], object]) -> None:
    """What the hub's cache holds of a repository that was downloaded."""
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    fill(folder / "snapshots" / ("0" * 40))


def timm_in_hub(tmp_path: Path, name: str) -> None:
    torch.manual_seed(5)
    tensors = timm.create_model(name).state_dict()

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")

    config = timm.get_pretrained_cfg(name)
    assert config is not None
    in_hub(tmp_path, f"timm/{config.architecture}.{config.tag}", fill)


@pytest.mark.parametrize(("name", "size"), [("test_resnet", None), ("test_vit", None), ("test_vit", 96)])
def test_weights_of_a_hub_are_those_that_the_driver_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int | None
) -> None:
    """Also where timm fits what depends on the size of images to another one."""
    timm_in_hub(tmp_path, name)
    (packed,) = same_elsewhere(BackboneSpec(name=f"timm/{name}"), monkeypatch, size=size)
    assert [*packed.files] == ["model.safetensors"]


@pytest.mark.parametrize("tag", ["", "@IMAGENET1K_V1"])
def test_so_are_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    torch.manual_seed(5)
    url = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
    place = tmp_path / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), place)
    same_elsewhere(BackboneSpec(name=f"torchvision/shufflenet_v2_x0_5{tag}"), monkeypatch)


def test_an_encoder_brings_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    in_hub(tmp_path, "someone/toy", lambda folder: text_encoder(folder))
    tokens = load_tokenizer("text/someone/toy")
    (packed,) = same_elsewhere(BackboneSpec(name="text/someone/toy"), monkeypatch)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= packed.files.keys()
    assert load_tokenizer("text/someone/toy").hash == tokens.hash


def test_an_encoder_with_other_weights_brings_its_configuration_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    name = text_encoder(tmp_path / "encoder")
    (packed,) = same_elsewhere(BackboneSpec(name=name, weights="random"), monkeypatch)
    assert "model.safetensors" not in packed.files


def test_a_weights_file_is_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    safetensors.torch.save_file(ToyNet().state_dict(), tmp_path / "own.safetensors")
    spec = BackboneSpec(name=TOY, weights=str(tmp_path / "own.safetensors"))
    (packed,) = same_elsewhere(spec, monkeypatch, size=16)
    found = place_of(packed.name)
    assert found is not None
    assert found.is_relative_to(cache_root())


def test_so_are_a_bundles_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = frostline.train(toy_training(tmp_path / "study", ["train.epochs=1", "freeze.norm=batch"]), inline=True)
    assert load_bundle(study / "bundle").parcels == [], "that of a toy is code"
    spec = BackboneSpec(name=TOY, weights=str((study / "bundle").resolve()))
    (packed,) = same_elsewhere(spec, monkeypatch, size=16)
    assert sorted(packed.files) == ["bundle.json", "model.safetensors"]


def test_what_comes_with_a_package_is_not_brought() -> None:
    for spec in (BackboneSpec(name=TOY, weights="random"), BackboneSpec(name="efficientnet-lite0")):
        assert parcels_of(spec, load_backbone(spec, image_size=32)) == []
