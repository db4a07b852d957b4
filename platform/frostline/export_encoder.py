"""Text encoders and their heads for other libraries: what exported ones are called with, and a folder for transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from frostline.bundle import Bundle
from frostline.encoder import Encoder
from frostline.extras import extra
from frostline.freeze import Network
from frostline.head import SeededDropout
from frostline.inputs import Texts
from frostline.spec import Task

PROBLEMS: dict[Task, str] = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls them."""


class OfIds(nn.Module):
    """A network that reads texts, with an argument for the ids of tokens and one for their types, where its encoder takes them."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """(N, T) each to (N, C)."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return self.network(torch.stack([input_ids, types], dim=1))


def named(backbone: nn.Module, fed: Tensor) -> dict[str, Tensor]:
    """What a network is fed, as the arguments of an exported one: (N, 3, H, W) images, or (N, 2, T) ids and types of tokens."""
    if not isinstance(backbone, Encoder):
        return {"images": fed}
    ids, types = (each.contiguous() for each in fed.unbind(dim=1))  # a tracer keeps their strides
    return {"input_ids": ids, "token_type_ids": types} if backbone.typed else {"input_ids": ids}


def save_for_transformers(
    bundle: Bundle, encoder: Encoder, head: nn.Sequential, folder: Path
) -> Callable[[Tensor], np.ndarray]:
    """Write an encoder and its tokenizer as transformers does, and the head beside them; answers what they give when they are read
    from there, (N, 2, T) ids and types of tokens to (N, C)."""
    texts = bundle.inputs
    assert isinstance(texts, Texts)
    assert bundle.tokenizer is not None, "it reads texts"
    transformers = extra("text", "transformers")
    model = transformers.AutoModel.from_config(copy.deepcopy(encoder.model.config))
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # as in `load_encoder`
    model.load_state_dict(encoder.model.state_dict())
    model.config.problem_type = PROBLEMS[bundle.task]
    model.config.id2label = dict(enumerate(bundle.classes))
    model.config.label2id = {name: number for number, name in enumerate(bundle.classes)}
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=extra("text", "tokenizers").Tokenizer.from_str(bundle.tokenizer.text),
        pad_token=bundle.tokenizer.pad,
        model_max_length=bundle.size,
        model_input_names=[*arguments(encoder), "attention_mask"],
        split_special_tokens=True,
    ).save_pretrained(folder)
    kept = plain_head(head)
    safetensors.save_file({name: each.clone() for name, each in kept.state_dict().items()}, folder / "head.safetensors")

    again, top = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval(), copy.deepcopy(kept)
    top.load_state_dict(safetensors.load_file(folder / "head.safetensors"))

    def give(fed: Tensor) -> np.ndarray:
        mask = fed[:, 0] != texts.pad
        with torch.no_grad():
            hidden = again(**named(encoder, fed), attention_mask=mask.long()).last_hidden_state
            return top(texts.pooled(hidden.masked_fill(~mask[..., None], 0))).numpy()

    return give


def usage(bundle: Bundle, target: str, folder: str, opened: str) -> list[str]:
    """Python that takes texts to logits with what is in this folder and `opened` so; to the ids of tokens, where that is tensors
    alone."""
    assert bundle.tokenizer is not None, "it reads texts"
    texts = '[("a text", "its second")]' if bundle.pair else '["a text", "another"]'
    if target == "transformers":
        layers = ", ".join(f"torch.nn.{layer!r}" for layer in plain_head(bundle.network.head))
        mean = bundle.inputs.pool == "mean"
        return [
            "import torch, transformers",
            "from safetensors.torch import load_file",
            "",
            f'tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}")',
            f"model = {opened}.eval()  # a pooler that it has is not used",
            f"head = torch.nn.Sequential({layers})",
            f'head.load_state_dict(load_file("{folder}/head.safetensors"))',
            f'given = tokenizer({texts}, padding=True, truncation=True, return_tensors="pt")',
            "hidden, mask = model(**given).last_hidden_state, given.attention_mask[..., None]",
            f"logits = head({'(hidden * mask).sum(1) / mask.sum(1)' if mean else 'hidden[:, 0]'})",
        ]
    names = arguments(bundle.network.backbone)
    given = ", ".join(f'"{name}": {name}.numpy()' for name in names)
    called = {
        "torch-export": [f"logits = {opened}({', '.join(names)})"],
        "onnx": [f'(logits,) = {opened}.run(["logits"], {{{given}}})'],
    }
    return [
        f"import {'onnxruntime, ' * (target == 'onnx')}tokenizers, torch",
        "",
        f'tokenizer = tokenizers.Tokenizer.from_file("{folder}/tokenizer.json")',
        "tokenizer.encode_special_tokens = True",
        f"tokenizer.enable_truncation({bundle.size})",
        f"tokenizer.enable_padding(pad_id={bundle.tokenizer.pad_id}, pad_token={json.dumps(bundle.tokenizer.pad)})",
        f"rows = tokenizer.encode_batch({texts})",
        "input_ids = torch.tensor([row.ids for row in rows])",
        *["token_type_ids = torch.tensor([row.type_ids for row in rows])"][: len(names) - 1],
        *called.get(target, []),
    ]


def arguments(backbone: nn.Module) -> list[str]:
    """The names in `named` of what an encoder is fed."""
    return [*named(backbone, torch.zeros(1, 2, 1))]


def plain_head(head: nn.Sequential) -> nn.Sequential:
    """A head without its dropout, whose layers are then all the library's own."""
    return nn.Sequential(*(layer for layer in head if not isinstance(layer, SeededDropout)))
