"""Bundles: a trained model on disk, as the tensors that training moved and what is needed to put them back.

A bundle is `model.safetensors` (the trained tensors, the backbone being named by its hash; or all), `bundle.json` (spec, labels,
preprocessing, scores, hashes, versions) and `README.md` (a model card). Nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import torch as safetensors
from torch import Tensor, nn

from frostline.adapters import adapt
from frostline.backbone import Backbone, load_backbone, parcels_of
from frostline.card import model_card
from frostline.closedform import pooled_width
from frostline.collectives import full
from frostline.commit import publish_folder, published, verify_folder
from frostline.cuts import Cut, cut_at, leave_at, round_at, widened
from frostline.data import recipe_of
from frostline.depths import end_of
from frostline.features import EVAL_BATCH, filled, on_device, rounded_at
from frostline.files import locate, read_bytes
from frostline.freeze import Applied, Network, Plan, apply_plan, compile_plan, pretrained_names, whole
from frostline.head import build_head
from frostline.images import BadImage, Fit, fitted
from frostline.inputs import Images, Inputs
from frostline.metrics import probabilities, said_of
from frostline.pixels import Recipe
from frostline.samples import BadSample, utf8
from frostline.spec import BackboneSpec, Data, Task
from frostline.staging import Parcel
from frostline.tokens import Tokenizer, load_tokenizer, parse_tokenizer, raw_of, tokenizer_files
from frostline.trialspec import TrialSpec
from frostline.weights import hash_tensors, read_weights
from frostline.world import autocast_dtype, find_device, mixed

FORMAT = 1
_ABOUT = {
    "spec": dict,
    "labels": list,
    "preprocessing": dict,
    "weights_hash": str,
    "stages_hash": str,
    "versions": dict,
}

Picture = str | Path | bytes | Image.Image | np.ndarray
"""An image: a local path or URI, encoded bytes, an opened image, or (H, W, 3) uint8 RGB pixels, (H, W) if grey."""


class BundleError(ValueError):
    """A folder that is not a bundle, or one that does not fit its backbone."""


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a bundle says of N samples."""

    labels: list[str] | list[tuple[str, ...]] | list[float]
    """The likeliest class of each; or all labels of a probability above one half; or the number."""
    probabilities: np.ndarray | None
    """(N, C) float32, in the order of the bundle's classes; None of a regression."""
    logits: np.ndarray
    """(N, C); of a regression (N, 1), the numbers."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained network, with all that is needed to show it images as its trial did."""

    about: Mapping[str, Any]
    """The content of bundle.json."""
    spec: TrialSpec
    backbone: Backbone
    """As it was before training; with random weights where the bundle holds all tensors."""
    plan: Plan
    network: Network
    """In eval mode, on the device."""
    rounds: bool
    """Whether it rounds activations on the way, as its trial did."""
    device: torch.device
    autocast: torch.dtype | None
    threads: int
    """Of a pass on a CPU."""
    inputs: Inputs
    """How rows become what the network is fed."""
    tokenizer: Tokenizer | None
    """Its own, where it reads texts."""

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """In the order of the logits; of a regression the name of its one number."""
        return tuple(self.about["labels"])

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Class -> its place among the logits."""
        return {name: number for number, name in enumerate(self.classes)}

    @property
    def task(self) -> Task:
        """What it predicts."""
        return self.spec.data.task

    @property
    def size(self) -> int:
        """Side of the square input in pixels, or its length in tokens."""
        return self.about["preprocessing"]["max_tokens" if self.tokenizer else "image_size"]

    @property
    def fit(self) -> Fit:
        """How an image becomes square."""
        return self.about["preprocessing"]["fit"]

    @cached_property
    def id(self) -> str:
        """16 hex digits over its tensors and what is known of it."""
        return hash_tensors(self.network.state_dict().items())[:16]

    @property
    def parcels(self) -> list[Parcel]:
        """What other nodes need of this machine to load it, besides its own files."""
        return parcels_of(_begun_with(self.about, self.spec), self.backbone)

    @property
    def pair(self) -> bool:
        """Whether a sample is two texts."""
        return self.about["preprocessing"].get("pair", False)

    @cached_property
    def recipe(self) -> Recipe:
        """How the raw content of a sample (an encoded image, `raw_of` texts) becomes what `pass_through` takes a row of."""
        return recipe_of(self.spec.data, None, self.tokenizer)

    def predict(
        self, samples: Iterable[Picture] | Iterable[str | Sequence[str]], *, batch_size: int = EVAL_BATCH
    ) -> Predicted:
        """Labels and probabilities of images, which are decoded, fitted and normalised as in training, or of texts (a pair is two
        of them), which are tokenised as there; N may be 0.

        Of EVAL_BATCH samples or more, with the default batch size, the logits are to the bit those that the trial gave or would have
        given, on the same hardware; fewer take a smaller pass, which differs in the last bits. Raises BadSample, naming the sample, where one cannot be used.
        """
        logits, held = [np.empty((0, len(self.classes)), np.float32)], []
        for number, sample in enumerate(samples):
            try:
                held.append(self.pixels(sample) if self.tokenizer is None else self.ids(sample))
            except BadSample as error:
                named = self.tokenizer is None and isinstance(sample, str | Path)
                name = str(sample) if named else f"{self.inputs.noun} {number}"
                raise type(error)(f"{name}: {error}") from None
            if len(held) == batch_size:
                logits.append(self.pass_through(np.stack(held))[0])
                held = []
        if held:
            logits.append(self.pass_through(np.stack(held), fill=len(logits) > 1)[0])
        found = np.concatenate(logits)
        likely = probabilities(found, self.task) if self.task != "regression" else None
        return Predicted(said_of(found, self.classes, self.task), likely, found)

    def pixels(self, image: Any) -> np.ndarray:
        """(size, size, 3) uint8 of an image. Raises BadImage."""
        if isinstance(image, str | Path):
            image = read_bytes(locate(str(image)))
        if isinstance(image, bytes):
            return self.recipe.make(image)
        if isinstance(image, Image.Image):
            return fitted(image, size=self.size, fit=self.fit)
        if not isinstance(image, np.ndarray):
            raise BadImage(f"a {type(image).__name__}: give a path, bytes, a PIL image or an array")
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise BadImage(f"an array {list(image.shape)} of {image.dtype}: give (H, W, 3) or (H, W) uint8")
        return fitted(Image.fromarray(np.ascontiguousarray(image)), size=self.size, fit=self.fit)

    def ids(self, sample: Any) -> np.ndarray:
        """(size, 2) int32 of a text or of a pair. Raises BadSample."""
        texts = (sample,) if isinstance(sample, str) else tuple(sample)
        wanted = 1 + self.pair
        if len(texts) != wanted or not all(isinstance(text, str) for text in texts):
            raise BadSample(f"a text each is needed, or of pairs two: here {wanted}")
        return self.recipe.make(raw_of([utf8(text) for text in texts]))

    def pass_through(self, rows: np.ndarray, *, fill: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(N, C) logits and the (N, D) features that the head is given, of (N, size, size, 3) uint8 pixels or (N, size, 2) int32 ids
        of tokens, in one batch, `filled` unless told not to."""
        (logits,), features = self.pass_heads(rows, [self.network.head], fill=fill)
        return logits, features

    def pass_heads(
        self, rows: np.ndarray, heads: Sequence[nn.Module], *, fill: bool
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """`pass_through` with the logits of each of these heads, which stand on the same features."""
        with _as_in_a_trial(self.threads), torch.no_grad(), mixed(self.device, self.autocast):
            fed = self.inputs.fed(rows, self.device)
            features = self.network.backbone(filled(fed) if fill else fed)
            logits = [widened(head(features))[: len(rows)].cpu().numpy() for head in heads]
            return logits, widened(features)[: len(rows)].cpu().numpy()


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
    scores = {name: value for name, value in row.items() if name.startswith(("val_", "test_", "n_"))}
    about = {
        "format": FORMAT,
        "full": False,
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
        "bundle.json": as_json(about),
        "README.md": model_card(spec, [stage.name for stage in backbone.stages], classes, row).encode(),
        **(tokenizer_files(spec.data.tokenizer) if spec.data.tokenizer else {}),
    }


def full_files(folder: str | Path) -> dict[str, bytes]:
    """The files of a bundle with the same network that holds all tensors, so that its backbone's weights are not needed.
    Raises BundleError."""
    bundle = load_bundle(folder, device="cpu")
    state = {name: tensor.contiguous().clone() for name, tensor in bundle.network.state_dict().items()}
    changed = {"model.safetensors": safetensors.save(state), "bundle.json": as_json({**bundle.about, "full": True})}
    return {**files_of(folder), **changed}


def files_of(folder: str | Path) -> dict[str, bytes]:
    """The files of the bundle in a folder, by name: all that has to travel."""
    names = (path for path in published(Path(folder)).iterdir() if path.name != "manifest.json")
    return {path.name: path.read_bytes() for path in names}


def bundle_of(files: Mapping[str, bytes], *, device: str | None = None) -> Bundle:
    """The bundle that these are the files of. Raises what `load_bundle` raises."""
    with tempfile.TemporaryDirectory(prefix="frostline-bundle-") as folder:
        publish_folder(Path(folder) / "bundle", files)
        return load_bundle(Path(folder) / "bundle", device=device)


def as_json(about: Mapping[str, Any]) -> bytes:
    """As bundle.json is written."""
    return (json.dumps(about, indent=2) + "\n").encode()


def load_bundle(folder: str | Path, *, device: str | None = None, threads: int | None = None) -> Bundle:
    """The bundle in a folder, as Frostline wrote it; its backbone must be there, with the weights that training began with unless
    the bundle holds all tensors.

    `device` is `cpu`, `cuda`, `mps` or `auto`, and `threads` what a pass takes on a CPU; by default both are the trial's, which
    gives its numbers to the bit. Raises BundleError, and BackboneError where the backbone cannot be had.
    """
    folder = published(Path(folder))
    about, tensors = _read(folder)
    spec = TrialSpec.model_validate(about["spec"])
    shown = about["preprocessing"]
    check_preprocessing(folder, shown)
    backbone = load_backbone(_begun_with(about, spec), image_size=spec.data.image_size)
    _check_backbone(folder, about, backbone)
    place = find_device(device or spec.resources.device)
    autocast = autocast_dtype(spec.config.train.precision, place)
    end = end_of(spec.config.head, len(backbone.stages))
    plan = compile_plan(spec.config.freeze, backbone.stages, end, spec.config.train.epochs)
    assert spec.data.size is not None, "a trial's is settled"
    rounding = rounded_at(backbone, spec.data.size, plan.cut, spec.features.dtype, autocast)
    network, stays = build_network(spec, backbone, plan, len(about["labels"]), place, rounding)
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    wrong = [name for name in missing if about.get("full") or name not in stays] + unexpected
    if wrong:
        raise BundleError(f"{folder}: tensors missing or unknown: {', '.join(wrong[:5])}")
    return Bundle(
        about=about,
        spec=spec,
        backbone=backbone,
        plan=plan,
        network=network,
        rounds=rounding is not None,
        device=place,
        autocast=autocast,
        threads=threads or spec.resources.threads,
        inputs=Images(tuple(shown["mean"]), tuple(shown["std"])) if "mean" in shown else backbone.inputs,
        tokenizer=tokenizer_of(folder, shown) if "tokenizer" in shown else None,
    )


def _begun_with(about: Mapping[str, Any], spec: TrialSpec) -> BackboneSpec:
    """The backbone that a bundle's tensors are laid over; which weights it has does not matter where these are all."""
    return spec.backbone.model_copy(update={"weights": "random"}) if about.get("full") else spec.backbone


def build_network(
    spec: TrialSpec, backbone: Backbone, plan: Plan, classes: int, device: torch.device, rounding: Cut | None
) -> tuple[Network, frozenset[str]]:
    """The network of a trial as it starts, for images, which rounds activations at `rounding` as storing them would; and which of
    its tensors training leaves alone."""
    cut = _end(spec, backbone, plan)
    width = backbone.feature_dim if cut is None else pooled_width(cut.shape)
    head = build_head(spec.config.head, width, classes, spec.seeds.head).to(device)
    network = Network(on_device(backbone, device), head)
    adapt(network.backbone, spec.config.freeze, backbone.stages[plan.cut : plan.end], spec.seeds.head)
    stays = pretrained_names(network, whole(apply_plan(plan, network, backbone)))
    dtype = getattr(torch, spec.features.dtype)
    if cut is not None:
        leave_at(network.backbone, cut, backbone.inputs.pooled, dtype if rounding and plan.only_head else None)
    if rounding is not None:
        round_at(network.backbone, rounding, dtype)
    return network.eval(), frozenset(stays)


def _end(spec: TrialSpec, backbone: Backbone, plan: Plan) -> Cut | None:
    """Where the head stands, if not at the end."""
    if plan.end == len(backbone.stages):
        return None
    assert spec.data.size is not None, "a trial's is settled"
    cut = cut_at(backbone, spec.data.size, plan.end)
    assert cut is not None, "it was trained there"
    return cut


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if problems := verify_folder(folder):
        raise BundleError(f"{folder} is not a bundle, or not as it was written: " + "; ".join(problems[:5]))
    try:
        about = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        written = about.get("format") if isinstance(about, dict) else None
        if written != FORMAT:
            raise BundleError(f"{folder}: bundle format {written!r}, and this version reads format {FORMAT}")
        if wrong := [key for key, kind in _ABOUT.items() if not isinstance(about.get(key), kind)]:
            raise BundleError(f"{folder}: its bundle.json lacks {', '.join(wrong)}, or holds something else there")
        TrialSpec.model_validate(about["spec"])
        return about, read_weights(folder / "model.safetensors")
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{folder} is not a bundle: {error}") from error


def _check_backbone(folder: Path, about: Mapping[str, Any], backbone: Backbone) -> None:
    spec = about["spec"]["backbone"]
    if not about.get("full") and backbone.weights_hash != about["weights_hash"]:
        raise BundleError(
            f"{folder}: made on a backbone with weights {about['weights_hash']}, but {spec['name']} "
            f"({spec['weights']}) now has {backbone.weights_hash}"
        )
    if backbone.stages_hash != about["stages_hash"]:
        raise BundleError(
            f"{folder}: made on stages {about['stages_hash']}, but {spec['name']} is now cut into {backbone.stages_hash}; "
            f"it was written with {json.dumps(about['versions'])}"
        )


@contextmanager
def _as_in_a_trial(threads: int) -> Iterator[None]:
    """PyTorch as `World.here` sets it, and then as it was."""
    fast, before = torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()
    torch.backends.mha.set_fastpath_enabled(False)
    if before != threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if before != threads:
            torch.set_num_threads(before)


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
