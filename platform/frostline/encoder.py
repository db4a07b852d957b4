"""Text encoders of Hugging Face's transformers, made to be left and resumed between any two layers.

An encoder passes an attention mask along beside its hidden states, so that these alone do not say how to go on. Here every
layer keeps what is padding at zero and masks what it finds to be zero: the hidden states are all that the rest depends on.
Whether that gives the numbers of the library's own masks is tried before an encoder is taken.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from frostline.extras import extra
from frostline.inputs import Texts, real
from frostline.spec import Pool
from frostline.stages import REFUSALS, BackboneError, named_tensors
from frostline.weights import load_weights, read_weights

TOLERANCE = 1e-4  # of features against the library's own, which other kernels of attention round otherwise
SIZE = 16  # tokens that this is tried on


class Encoder(nn.Module):
    """A library's encoder under a pooling."""

    def __init__(self, model: nn.Module, texts: Texts) -> None:
        super().__init__()
        self.model = model
        self.texts = texts
        self.typed = texts.types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, 2, T) ids and types of tokens to (N, D) features."""
        ids, types = tokens.long().unbind(dim=1)
        typed = {"token_type_ids": types} if self.typed else {}
        return self.texts.pooled(self.model(input_ids=ids, **typed).last_hidden_state)


def load_encoder(folder: Path, weights: str, pool: Pool) -> tuple[Encoder, list[list[str]], list[str]]:
    """An encoder from a folder with config.json and model.safetensors, with the groups of tensors that are its stages, and the
    names of these: the embeddings, then every layer. `weights` is `pretrained`, `random` or a file.

    Raises BackboneError, or MissingExtraError where transformers is not installed. No code and no pickle in the folder is
    ever run or read.
    """
    transformers = extra("text", "transformers")
    transformers.logging.set_verbosity_error()  # it announces every tensor that it leaves out
    transformers.logging.disable_progress_bar()
    kept = {"trust_remote_code": False, "attn_implementation": "sdpa", "dtype": torch.get_default_dtype()}
    try:
        if weights == "pretrained":
            given = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
            model, info = transformers.AutoModel.from_pretrained(str(folder), **given, **kept)
        else:
            config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            model, info = transformers.AutoModel.from_config(config, **kept), {}
    except (OSError, *REFUSALS) as error:
        raise BackboneError(f"transformers cannot build what {folder} holds: {error}") from error
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # trained for next sentences, and no part of what is pooled here
    held = {name for name, _ in named_tensors(model)}
    if missing := sorted(held & {str(name) for name in info.get("missing_keys", ())}):
        raise BackboneError(f"{folder} lacks weights for {', '.join(missing[:5])}")
    if weights not in ("pretrained", "random"):
        load_weights(model, _named_like(model, read_weights(Path(weights))), weights)
    return _resumable(model.eval(), pool)


def _named_like(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the bare encoder: those of a network around it (`bert.…`), without its heads."""
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in weights):
        weights = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
    return {name: each for name, each in weights.items() if name.partition(".")[0] != "pooler"}


def _resumable(model: Any, pool: Pool) -> tuple[Encoder, list[list[str]], list[str]]:
    config, embeddings = model.config, getattr(model, "embeddings", None)
    path, layers = next(
        (
            (name, part)
            for name, part in model.named_modules()
            if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers
        ),
        (None, nn.ModuleList()),
    )
    kind = f"{config.model_type}: no encoder that can be cut"
    if path is None or embeddings is None or config.pad_token_id is None:
        lacks = (
            "layers" if path is None else "`embeddings` before its layers" if embeddings is None else "a padding token"
        )
        raise BackboneError(f"{kind}, for it lacks {lacks}")
    texts = Texts(
        vocabulary=config.vocab_size,
        pad=config.pad_token_id,
        types=getattr(config, "type_vocab_size", 0) or 1,
        longest=_longest(config, embeddings),
        pool=pool,
    )
    try:
        same = _gives_the_same(copy.deepcopy(model), path, texts)
        _mask_by_zeros(embeddings, layers, texts.pad)
    except (ValueError, *REFUSALS) as error:
        raise BackboneError(f"{kind} ({type(error).__name__}: {error})") from error
    if not same:
        raise BackboneError(f"{kind}, for its hidden states do not say what is padding")
    encoder = Encoder(model, texts)
    numbers = range(len(layers))
    groups = _groups(encoder, [f"model.{path}.{number}." for number in numbers])
    return encoder, groups, ["embeddings", *(f"layer.{number}" for number in numbers)]


@torch.no_grad()
def _gives_the_same(model: nn.Module, path: str, texts: Texts) -> bool:
    """Whether zeros mask as the library's own masks do, also once training has moved what is zero at first (biases); `model` is
    used up."""
    tokens = texts.noise(3, SIZE)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ids = tokens[:, 0]
    mask = ids != texts.pad
    hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    expected = texts.pooled(hidden.masked_fill(~mask[..., None], 0))
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    _mask_by_zeros(model.get_submodule("embeddings"), layers, texts.pad)
    found = Encoder(model, texts)(tokens)
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


def _mask_by_zeros(embeddings: nn.Module, layers: Iterable[nn.Module], pad: int) -> None:
    """Give these modules, in place, classes that keep padding at zero; all names stay."""
    embeddings.__class__ = _zeroing(type(embeddings), pad)
    for layer in layers:
        layer.__class__ = _masking(type(layer))


@functools.cache
def _zeroing(kind: type[nn.Module], pad: int) -> type[nn.Module]:
    """Embeddings of this kind that are zero where the id is `pad`."""

    def forward(self: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(N, T) ids to (N, T, D)."""
        return kind.forward(self, input_ids, *args, **kwargs).masked_fill((input_ids == pad)[..., None], 0)

    return type(f"Zeroing{kind.__name__}", (kind,), {"forward": forward})


@functools.cache
def _masking(kind: type[nn.Module]) -> type[nn.Module]:
    """Layers of this kind that take what is zero for padding, and leave it at zero."""
    place = [*inspect.signature(kind.forward).parameters].index(
        "attention_mask"
    ) - 2  # after self and the hidden states

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(N, T, D) to as many, in whatever the library wraps them."""
        there = real(hidden_states)
        mask = there[:, None, None, :].expand(-1, 1, there.shape[1], -1)  # (N, 1, T, T): which keys a query sees
        given = args[place] if place < len(args) else kwargs.get("attention_mask")
        if given is not None:  # a window of the library's own, in which padding sees itself lest it see nothing
            mask = given & (mask | torch.eye(there.shape[1], dtype=torch.bool, device=mask.device))
        if place < len(args):
            args = (*args[:place], mask, *args[place + 1 :])
        else:
            kwargs["attention_mask"] = mask
        output = kind.forward(self, hidden_states, *args, **kwargs)
        return tree_map_only(Tensor, lambda each: each.masked_fill(~there[..., None], 0), output)

    return type(f"Masking{kind.__name__}", (kind,), {"forward": forward})


def _longest(config: Any, embeddings: nn.Module) -> int:
    """How many tokens an encoder takes; RoBERTa counts positions from after its padding's."""
    positions = getattr(embeddings, "position_embeddings", None)
    first = getattr(positions, "padding_idx", None)
    return config.max_position_embeddings - (0 if first is None else first + 1)


def _groups(encoder: Encoder, layers: Sequence[str]) -> list[list[str]]:
    """Every tensor in a stage: what stands before the layers is with the embeddings, what stands after them with the last."""
    groups: list[list[str]] = [[] for _ in range(len(layers) + 1)]
    now = 0
    for name, _ in named_tensors(encoder):
        now = next((number for number, layer in enumerate(layers, 1) if name.startswith(layer)), now)
        groups[now].append(name)
    return groups
