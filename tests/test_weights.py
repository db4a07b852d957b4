"""Weights files: what is read, what is refused, and that damage never gets further than a BackboneError."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frostline.stages import BackboneError
from frostline.weights import MAX_HEADER_BYTES, hash_weights, load_weights, read_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def saved(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "args": {"lr": 0.1}},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "module.": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    "compiled in DDP": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_state_dict_comes_back_out_of_its_wrapping(tmp_path: Path, wrapping: str) -> None:
    state = network().state_dict()
    tensors = read_weights(saved(tmp_path / "w.pt", WRAPPINGS[wrapping](state)))
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_loading_a_saved_network_gives_its_hash(tmp_path: Path, suffix: str) -> None:
    source, target = network(), network()
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    loaded = load_weights(target, read_weights(saved(tmp_path / f"w.{suffix}", state)), "w")
    assert loaded == set(state)
    assert hash_weights(target) == hash_weights(source)


def test_half_precision_is_widened_and_the_old_batch_norm_without_a_counter_is_accepted() -> None:
    source, target = network(), network()
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in source.state_dict().items()
    }
    del state["1.num_batches_tracked"]
    load_weights(target, state, "w")
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight, source[0].weight.half().float())


def test_the_hash_sees_values_names_shapes_and_buffers() -> None:
    torch.manual_seed(0)
    module = network()
    hashes = {hash_weights(module)}
    module[1].running_mean[2] += 1
    hashes.add(hash_weights(module))
    module[1].num_batches_tracked += 1
    hashes.add(hash_weights(module))
    module[3].weight.data = module[3].weight.data.reshape(4, 2)
    hashes.add(hash_weights(module))
    hashes.add(hash_weights(nn.Sequential(module)))
    assert len(hashes) == 5
    assert all(len(digest) == 16 for digest in hashes)


def test_all_that_does_not_fit_is_listed_ten_of_each() -> None:
    module = network()
    state = module.state_dict()
    state |= {f"extra.{i:02}": torch.zeros(1) for i in range(12)}
    del state["0.bias"]
    state["3.weight"] = torch.zeros(5, 4)
    state["1.running_var"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(BackboneError) as caught:
        load_weights(module, state, "w.pt")
    text = str(caught.value)
    assert text.startswith("w.pt does not fit the network:\n  1 missing: 0.bias\n  12 unexpected: extra.00, extra.01")
    assert "extra.09 and 2 more" in text
    assert "3.weight float32[5, 4] for float32[2, 4]" in text
    assert "1.running_var int64[4] for float32[4]" in text


def test_a_classifier_may_be_absent_or_of_another_size_and_is_then_left_alone() -> None:
    module = network()
    kept = module[3].weight.clone()
    head = {"3.weight", "3.bias"}
    state = network().state_dict()
    assert (
        load_weights(module, state | {"3.weight": torch.zeros(9, 4), "3.bias": torch.zeros(9)}, "w", head)
        == state.keys() - head
    )
    assert torch.equal(module[3].weight, kept)
    load_weights(module, {name: state[name] for name in state.keys() - head}, "w", head)
    assert torch.equal(module[3].weight, kept)
    assert load_weights(module, state, "w", head) == state.keys()
    assert torch.equal(module[3].weight, state["3.weight"])


def test_weights_that_are_not_finite_are_refused() -> None:
    state = network().state_dict()
    state["0.weight"][1, 2, 0, 0] = float("nan")
    with pytest.raises(BackboneError, match=r"w: NaN or infinity in 0.weight"):
        load_weights(network(), state, "w")


class Evil:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return exec, ("raise SystemExit('code of the file ran')",)


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    for number, content in enumerate([Evil(), {"w": Evil()}, {"state_dict": {"w": torch.zeros(1)}, "extra": Evil()}]):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        with pytest.raises(BackboneError, match=r"without running code from it"):
            read_weights(path)
        path.write_bytes(pickle.dumps(content if number < 2 else Evil(), protocol=2))
        with pytest.raises(BackboneError, match=r"without running code from it"):
            read_weights(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no file .*absent.pt: weights are 'pretrained', 'random', or the path"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(BackboneError, match="holds a Tensor, not a state dict"):
        read_weights(saved(tmp_path / "tensor.pt", torch.zeros(3)))
    with pytest.raises(BackboneError, match="epoch: not plain dense tensors"):
        read_weights(saved(tmp_path / "checkpoint.pt", {"epoch": 1, "w": torch.zeros(1)}))
    with pytest.raises(BackboneError, match="w: not plain dense tensors"):
        read_weights(saved(tmp_path / "sparse.pt", {"w": torch.eye(3).to_sparse()}))


def test_a_tensor_that_claims_more_than_it_stores_is_not_expanded(tmp_path: Path) -> None:
    state = network().state_dict()
    state["0.weight"] = torch.zeros(1).expand(1 << 20, 1 << 20)  # 4 TiB if it were copied
    path = saved(tmp_path / "huge.pt", state)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(BackboneError, match=r"0.weight float32\[1048576, 1048576\] for float32\[4, 3, 3, 3\]"):
        load_weights(network(), read_weights(path), "huge")


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain.pt", {"w": torch.zeros(1 << 20)})
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(BackboneError, match="compressed archive"):
        read_weights(tmp_path / "bomb.pt")


def test_a_giant_safetensors_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(BackboneError, match=r"a header of 16,777,217 bytes is not read"):
        read_weights(path)


def _bytes_of(suffix: str) -> bytes:
    state = network().state_dict()
    if suffix == "safetensors":
        return safetensors.torch.save(state)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=suffix == "pt")
    return buffer.getvalue()


INTACT = {suffix: _bytes_of(suffix) for suffix in ("safetensors", "pt", "legacy")}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage is deprecated")
@settings(max_examples=150, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(sorted(INTACT)))
def test_a_damaged_file_gives_tensors_or_a_backbone_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    content = bytearray(INTACT[suffix])
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        tensors = read_weights(path)
        load_weights(network(), tensors, "damaged")
    except BackboneError:
        return
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
