"""Bundles: a trained model on disk, as the tensors that training moved and what is needed to put them back.

A bundle is `model.safetensors` (the trained tensors; the backbone is named by its hash), `bundle.json` (spec, labels,
preprocessing, scores, hashes, versions) and `README.md` (a model card). Nothing in it is executed when it is read.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import torch as safetensors

from frostline.adapters import adapt
from frostline.backbone import Backbone, load_backbone
from frostline.closedform import pooled_width
from frostline.collectives import full
from frostline.commit import published, verify_folder
from frostline.cuts import cut_at, leave_at
from frostline.depths import end_of
from frostline.freeze import Applied, Network, apply_plan, compile_plan, pretrained_names, whole
from frostline.head import build_head
from frostline.inputs import Images, Inputs
from frostline.modality import reads_text
from frostline.spec import Data, TrialSpec
from frostline.tokens import Tokenizer, load_tokenizer, parse_tokenizer, tokenizer_files

FORMAT = 1


class BundleError(ValueError):
    """A folder that is not a bundle, or one that does not fit its backbone."""


def bundle_files(
    spec: TrialSpec,
    network: Network,
    applied: Applied,
    backbone: Backbone,
    classes: tuple[str, ...],
    row: dict[str, Any],
) -> dict[str, bytes]:
    """The files of a bundle, by name. Of a network that is spread over workers all must ask."""
    stays = pretrained_names(network, applied)
    state = {name: full(tensor.detach()).cpu() for name, tensor in network.state_dict().items()}
    moved = {name: tensor.contiguous() for name, tensor in state.items() if name not in stays}
    scores = {name: value for name, value in row.items() if name.startswith(("val_", "test_"))}
    about = {
        "format": FORMAT,
        "spec": spec.model_dump(mode="json"),
        "labels": list(classes),
        "preprocessing": preprocessing_of(spec.data, backbone.inputs),
        "scores": scores,
        "weights_hash": backbone.weights_hash,
        "stages_hash": backbone.stages_hash,
        "data_hash": row["data_hash"],
        "versions": json.loads(row["versions"]),
    }
    return {
        "model.safetensors": safetensors.save(moved),
        "bundle.json": (json.dumps(about, indent=2) + "\n").encode(),
        "README.md": _model_card(spec, classes, row).encode(),
        **(tokenizer_files(spec.data.tokenizer) if spec.data.tokenizer else {}),
    }


def load_bundle(folder: str | Path) -> tuple[Network, dict[str, Any]]:
    """The network of a bundle in eval mode, and the content of its bundle.json. Raises BundleError."""
    folder = published(Path(folder))
    if problems := verify_folder(folder):
        raise BundleError(f"{folder} is not a bundle, or not as it was written: " + "; ".join(problems[:5]))
    try:
        about = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        tensors = safetensors.load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder} is not a bundle: {error}") from error
    if about.get("format") != FORMAT:
        raise BundleError(f"{folder}: bundle format {about.get('format')!r}, and this version reads format {FORMAT}")
    spec = TrialSpec.model_validate(about["spec"])
    check_preprocessing(folder, about["preprocessing"])
    backbone = load_backbone(spec.backbone, image_size=spec.data.image_size)
    if backbone.weights_hash != about["weights_hash"]:
        raise BundleError(
            f"{folder}: made on a backbone with weights {about['weights_hash']}, but {spec.backbone.name} "
            f"({spec.backbone.weights}) now has {backbone.weights_hash}"
        )
    stages, size = len(backbone.stages), spec.data.size
    end, width = end_of(spec.config.head, stages), backbone.feature_dim
    trunk = copy.deepcopy(backbone.module)
    if end < stages:
        assert size is not None, "settled before it was trained"
        cut = cut_at(backbone, size, end)
        assert cut is not None, "it was trained there"
        leave_at(trunk, cut, backbone.inputs.pooled)
        width = pooled_width(cut.shape)
    network = Network(trunk, build_head(spec.config.head, width, len(about["labels"]), spec.seeds.head))
    plan = compile_plan(spec.config.freeze, backbone.stages, end, spec.config.train.epochs)
    adapt(network.backbone, spec.config.freeze, backbone.stages[plan.cut : plan.end], spec.seeds.head)
    applied = whole(apply_plan(plan, network, backbone))
    stays = pretrained_names(network, applied)
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    wrong = [name for name in missing if name not in stays] + unexpected
    if wrong:
        raise BundleError(f"{folder}: tensors missing or unknown: {', '.join(wrong[:5])}")
    return network.eval(), about


def preprocessing_of(data: Data, inputs: Inputs) -> dict[str, Any]:
    """What is done to a sample before the network is fed it, as JSON values."""
    if isinstance(inputs, Images):
        return {"image_size": data.image_size, "fit": data.fit, **inputs.about()}
    assert data.tokenizer is not None, "settled before it was trained"
    tokenizer, pair = load_tokenizer(data.tokenizer), data.pair_column is not None
    kept = {"tokenizer": tokenizer.hash, "pad_token": tokenizer.pad, "pad_id": tokenizer.pad_id}
    return {**kept, "max_tokens": data.max_tokens, "pair": pair, "pool": inputs.pool}


def check_preprocessing(folder: Path, said: dict[str, Any]) -> None:
    """Whether a bundle's tokenizer is the one that it was trained with. Raises BundleError."""
    if "tokenizer" in said and (found := tokenizer_of(folder, said).hash) != said["tokenizer"]:
        raise BundleError(f"{folder}: its tokenizer.json has hash {found}, and it was trained with {said['tokenizer']}")


def tokenizer_of(folder: Path, said: dict[str, Any]) -> Tokenizer:
    """The tokenizer in a bundle of this preprocessing. Raises BundleError."""
    try:
        return parse_tokenizer(str(folder), (folder / "tokenizer.json").read_text(encoding="utf-8"), said["pad_token"])
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}: its tokenizer cannot be read: {error}") from error


def _model_card(spec: TrialSpec, classes: tuple[str, ...], row: dict[str, Any]) -> str:
    config, noun = spec.config, "text" if reads_text(spec.backbone.name) else "image"
    return f"""---
library_name: frostline
tags: [{noun}-classification, transfer-learning]
base_model: {spec.backbone.name}
---
# {spec.trial_id}

`{spec.backbone.name}` fine-tuned with strategy `{config.freeze.strategy}`: {row["freeze_depth"]} of {row["stages"]}
stages frozen, the head after stage {row["head_depth"]}, norm layers `{config.freeze.norm}`, {row["trainable_params"]:,} of {row["total_params"]:,} parameters
trained on {row["n_train"]} {noun}s for {row["epochs"]} epochs.

| split | n | accuracy | NLL |
|---|---|---|---|
| test | {row["n_test"]} | {row["test_accuracy"]:.4f} | {row["test_nll"]:.4f} |

{len(classes)} classes: {", ".join(classes[:50])}{", …" if len(classes) > 50 else ""}.

One seed ({spec.seed}); the study's trials table has the others. The whole configuration is in `bundle.json`.
"""
