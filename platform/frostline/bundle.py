"""Bundles: a trained model on disk, as the tensors that training moved and what is needed to put them back.

A bundle is `model.safetensors` (the trained tensors, the backbone being named by its hash; or all), `bundle.json` (spec, labels,
preprocessing, scores, hashes, versions) and `README.md` (a model card). Nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
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
from frostline.backbone import Backbone, load_backbone
from frostline.card import model_card
from frostline.closedform import pooled_width
from frostline.collectives import full
from frostline.commit import published, verify_folder
from frostline.cuts import Cut, cut_at, leave_at, round_at, widened
from frostline.depths import end_of
from frostline.features import EVAL_BATCH, filled, normalised, on_device, rounded_at
from frostline.files import locate, read_bytes
from frostline.freeze import Applied, Network, Plan, apply_plan, compile_plan, pretrained_names, whole
from frostline.head import build_head
from frostline.images import BadImage, Fit, decode, fitted
from frostline.metrics import probabilities
from frostline.spec import TrialSpec
from frostline.weights import hash_tensors, read_weights
from frostline.world import autocast_dtype, find_device, mixed

FORMAT = 1

Picture = str | Path | bytes | Image.Image | np.ndarray
"""An image: a local path or URI, encoded bytes, an opened image, or (H, W, 3) uint8 RGB pixels, (H, W) if grey."""


class BundleError(ValueError):
    """A folder that is not a bundle, or one that does not fit its backbone."""


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a bundle says of N images."""

    labels: list[str]
    """The likeliest class of each."""
    probabilities: np.ndarray
    """(N, C) float32, in the order of the bundle's classes."""
    logits: np.ndarray
    """(N, C)."""


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

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the logits."""
        return tuple(self.about["labels"])

    @property
    def size(self) -> int:
        """Side of the square input in pixels."""
        return self.about["preprocessing"]["image_size"]

    @property
    def fit(self) -> Fit:
        """How an image becomes square."""
        return self.about["preprocessing"]["fit"]

    @cached_property
    def id(self) -> str:
        """16 hex digits over its tensors and what is known of it."""
        return hash_tensors(self.network.state_dict().items())[:16]

    def predict(self, images: Iterable[Picture], *, batch_size: int = EVAL_BATCH) -> Predicted:
        """Labels and probabilities of images, which are decoded, fitted and normalised as in training; N may be 0.

        Of EVAL_BATCH images or more, with the default batch size, the logits are to the bit those that the trial gave or would have
        given, on the same hardware; fewer take a smaller pass, which differs in the last bits. Raises BadImage, naming the image, where one cannot be used.
        """
        logits, held = [np.empty((0, len(self.classes)), np.float32)], []
        for number, image in enumerate(images):
            try:
                held.append(self.pixels(image))
            except BadImage as error:
                name = str(image) if isinstance(image, str | Path) else f"image {number}"
                raise BadImage(f"{name}: {error}") from None
            if len(held) == batch_size:
                logits.append(self.pass_through(np.stack(held))[0])
                held = []
        if held:
            logits.append(self.pass_through(np.stack(held), fill=len(logits) > 1)[0])
        found = np.concatenate(logits)
        labels = [self.classes[label] for label in found.argmax(axis=1)]
        return Predicted(labels, probabilities(found), found)

    def pixels(self, image: Picture) -> np.ndarray:
        """(size, size, 3) uint8 of an image. Raises BadImage."""
        if isinstance(image, str | Path):
            image = read_bytes(locate(str(image)))
        if isinstance(image, bytes):
            most = int(self.spec.data.max_megapixels * 1_000_000)
            return decode(image, size=self.size, fit=self.fit, max_pixels=most)
        if isinstance(image, Image.Image):
            return fitted(image, size=self.size, fit=self.fit)
        if not isinstance(image, np.ndarray):
            raise BadImage(f"a {type(image).__name__}: give a path, bytes, a PIL image or an array")
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise BadImage(f"an array {list(image.shape)} of {image.dtype}: give (H, W, 3) or (H, W) uint8")
        return fitted(Image.fromarray(np.ascontiguousarray(image)), size=self.size, fit=self.fit)

    def pass_through(self, pixels: np.ndarray, *, fill: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(N, C) logits and the (N, D) features that the head is given, of (N, size, size, 3) uint8 pixels, in one batch, `filled`
        unless told not to."""
        (logits,), features = self.pass_heads(pixels, [self.network.head], fill=fill)
        return logits, features

    def pass_heads(
        self, pixels: np.ndarray, heads: Sequence[nn.Module], *, fill: bool
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """`pass_through` with the logits of each of these heads, which stand on the same features."""
        shown, count = self.about["preprocessing"], len(pixels)
        with _as_in_a_trial(self.threads), torch.no_grad(), mixed(self.device, self.autocast):
            images = normalised(pixels, tuple(shown["mean"]), tuple(shown["std"]), self.device)
            features = self.network.backbone(filled(images) if fill else images)
            logits = [widened(head(features))[:count].cpu().numpy() for head in heads]
            return logits, widened(features)[:count].cpu().numpy()


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
        "preprocessing": {
            "image_size": spec.data.image_size,
            "fit": spec.data.fit,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        },
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
    }


def full_files(folder: str | Path) -> dict[str, bytes]:
    """The files of a bundle with the same network that holds all tensors, so that its backbone's weights are not needed.
    Raises BundleError."""
    bundle = load_bundle(folder, device="cpu")
    state = {name: tensor.contiguous().clone() for name, tensor in bundle.network.state_dict().items()}
    return {
        "model.safetensors": safetensors.save(state),
        "bundle.json": as_json({**bundle.about, "full": True}),
        "README.md": (published(Path(folder)) / "README.md").read_bytes(),
    }


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
    wanted = spec.backbone.model_copy(update={"weights": "random"}) if about.get("full") else spec.backbone
    backbone = load_backbone(wanted, image_size=spec.data.image_size)
    _check_backbone(folder, about, backbone)
    place = find_device(device or spec.resources.device)
    autocast = autocast_dtype(spec.config.train.precision, place)
    end = end_of(spec.config.head, len(backbone.stages))
    plan = compile_plan(spec.config.freeze, backbone.stages, end, spec.config.train.epochs)
    assert spec.data.image_size is not None, "a trial's is resolved"
    rounding = rounded_at(backbone, spec.data.image_size, plan.cut, spec.features.dtype, autocast)
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
    )


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
        leave_at(network.backbone, cut, dtype if rounding and plan.only_head else None)
    if rounding is not None:
        round_at(network.backbone, rounding, dtype)
    return network.eval(), frozenset(stays)


def _end(spec: TrialSpec, backbone: Backbone, plan: Plan) -> Cut | None:
    """Where the head stands, if not at the end."""
    if plan.end == len(backbone.stages):
        return None
    assert spec.data.image_size is not None, "a trial's is resolved"
    cut = cut_at(backbone, spec.data.image_size, plan.end)
    assert cut is not None, "it was trained there"
    return cut


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if problems := verify_folder(folder):
        raise BundleError(f"{folder} is not a bundle, or not as it was written: " + "; ".join(problems[:5]))
    try:
        about = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise BundleError(
                f"{folder}: bundle format {about.get('format')!r}, and this version reads format {FORMAT}"
            )
        return about, read_weights(folder / "model.safetensors")
    except (OSError, ValueError) as error:
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
