"""What must be known before a study: the data is read and split, the backbone loaded and divided into stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frostline.backbone import Backbone, BackboneError, load_backbone, parcels_of
from frostline.commit import published
from frostline.cuts import cuts_at, cuts_of
from frostline.data import DataError, Dataset, load_data, subset
from frostline.depths import depth_of, end_of
from frostline.files import locate
from frostline.inputs import Images
from frostline.modality import BUNDLE, PREFIX, modality_mistakes
from frostline.models import Scalar
from frostline.propose import distributions, entries_of
from frostline.seeds import derive_seed
from frostline.sources import NAMES
from frostline.spec import Arm, BackboneSpec, Data, Head, Job
from frostline.staging import Parcel
from frostline.targets import task_mistakes
from frostline.tokens import load_tokenizer
from frostline.versions import versions
from frostline.world import find_device, hardware


@dataclass(frozen=True)
class Prepared:
    """A job with nothing left open, and what it stands on."""

    job: Job
    backbone: Backbone
    dataset: Dataset
    n_train: int

    @property
    def facts(self) -> dict[str, Any]:
        """What is recorded beside the job, as JSON values."""
        return {
            "image_size": self.job.data.image_size,
            "max_tokens": self.job.data.max_tokens,
            "classes": list(self.dataset.classes),
            "n_train": self.n_train,
            "n_val": len(self.dataset.indices("val")),
            "n_test": len(self.dataset.indices("test")),
            "excluded": len(self.dataset.excluded),
            "data_hash": self.dataset.data_hash,
            "split_hash": self.dataset.split_hash,
            "stages": [stage.name for stage in self.backbone.stages],
            "stages_hash": self.backbone.stages_hash,
            "weights_hash": self.backbone.weights_hash,
            "feature_dim": self.backbone.feature_dim,
            "hardware": hardware(find_device("cpu")),
            "versions": versions(),
        }

    @property
    def parcels(self) -> list[Parcel]:
        """What other nodes need of this machine to train it."""
        return parcels_of(self.job.backbone, self.backbone, self.job.data.tokenizer)


def prepare(job: Job, progress: Callable[[int, int], None] | None = None) -> Prepared:
    """Load what the job names and check that all of it fits together, before anything is spent.

    Raises DataError, BackboneError or SpaceError, all of them ValueErrors.
    """
    job = _with_absolute_paths(job)
    if mistakes := [
        *modality_mistakes(job),
        *task_mistakes(job),
    ]:  # of a job that was put together from another's parts
        raise DataError("; ".join(mistakes))
    backbone = load_backbone(job.backbone, image_size=job.data.image_size)
    data = settled(job, backbone)
    job = job.model_copy(update={"data": data})
    dataset = load_data(data, derive_seed(job.seed, "split"), progress=progress)
    train = subset(dataset, data.per_class, derive_seed(job.seed, "subset"))
    depth_of(job.freeze, len(backbone.stages))
    check_scratch(job)
    check_live_norms(job)
    check_compiled(job)
    check_heads(job, backbone, dataset.size)
    check_objective(job, dataset)
    return Prepared(job, backbone, dataset, len(train))


def settled(job: Job, backbone: Backbone) -> Data:
    """The job's data section with its size, and of texts the tokenizer, as the backbone has them where the job says nothing.
    Raises DataError where the backbone cannot take what they make."""
    data, inputs = job.data, backbone.inputs
    if isinstance(inputs, Images):
        return data.model_copy(update={"image_size": data.image_size or backbone.size})
    size, name = data.max_tokens or backbone.size, data.tokenizer or job.backbone.name
    if size > inputs.longest:
        raise DataError(f"data.max_tokens = {size}: {backbone.name} takes at most {inputs.longest} tokens")
    tokenizer = load_tokenizer(name)
    if tokenizer.vocabulary > inputs.vocabulary or tokenizer.pad_id != inputs.pad:
        raise DataError(
            f"data.tokenizer = {name!r} has {tokenizer.vocabulary:,} ids and pads with {tokenizer.pad_id}, and {backbone.name} "
            f"has {inputs.vocabulary:,} and pads with {inputs.pad}: leave it out, or name the encoder's own"
        )
    return data.model_copy(update={"max_tokens": size, "tokenizer": name})


def check_scratch(job: Job) -> None:
    """Whether the network can be had with random weights, where an arm starts from them. Raises BackboneError."""
    arms = [name for name, arm in job.arms.items() if arm.strategy == "scratch"]
    if arms and job.backbone.name.startswith("python:") and job.backbone.weights != "random":
        raise BackboneError(
            f"arms.{arms[0]}: strategy = 'scratch' needs random weights, and what {job.backbone.name} makes may be trained; "
            'if it makes random ones, say so with backbone.weights = "random"'
        )


def check_live_norms(job: Job) -> None:
    """Whether norm layers that are live see whole batches. Raises BackboneError; whether several workers do, each says itself."""
    if job.scaling.micro_batch is None:
        return
    for name, arm in job.arms.items():
        if arm.strategy == "scratch" or _may_be(arm, "freeze.norm", job.freeze.norm, "batch"):
            raise BackboneError(
                f'arms.{name}: norm layers under freeze.norm = "batch" go by the statistics of what they are given at once, which '
                "scaling.micro_batch makes smaller; leave micro_batch out, or use another norm"
            )


def check_compiled(job: Job) -> None:
    """Whether what arms compile can be. Raises BackboneError."""
    for name, arm in job.arms.items():
        if job.scaling.mode == "fsdp" and _may_be(arm, "train.compile", job.train.compile, True):
            raise BackboneError(
                f'arms.{name}: train.compile = true is not for scaling.mode = "fsdp", which makes parameters whole piece by piece; '
                "leave one of them out"
            )


def check_heads(job: Job, backbone: Backbone, image_size: int) -> None:
    """Whether the backbone can be left wherever a head of the job may stand. Raises SpaceError and BackboneError."""
    stages = len(backbone.stages)
    depths: set[int] = set()
    for arm in job.arms.values():
        searched = distributions(arm, stages).get("head.depth")
        entries = entries_of(searched) if searched else [arm.space.get("head.depth", job.head.depth)]
        depths |= {end_of(Head.model_validate({"depth": depth}), stages) for depth in entries}
    if wrong := sorted(depths - {stages} - cuts_at(backbone, image_size, depths - {stages}).keys()):
        right = ", ".join(map(str, cuts_of(backbone, image_size)))
        raise BackboneError(
            f"head.depth: {backbone.name} has more than one stream of activations after stage {wrong[0]}, so that no head "
            f"can stand there; it can after these: {right}"
        )


def check_objective(job: Job, dataset: Dataset) -> None:
    """Whether the objective can be computed. Raises DataError."""
    metric, task = job.objective.metric, dataset.target.task
    if metric not in ("auroc", "r2", "spearman"):
        return
    for split in ("val", "test"):
        labels = dataset.labels[dataset.indices(split)]
        if task == "classification" and len(present := np.unique(labels)) < 2:
            raise DataError(
                f"objective.metric = 'auroc' tells classes apart, and in {split} there is only "
                f"{dataset.classes[present[0]]!r}; use another metric, or give {split} samples of other classes"
            )
        if task == "multilabel" and not ((share := labels.mean(axis=0)) * (1 - share)).any():
            raise DataError(
                f"objective.metric = 'auroc' tells who has a label from who lacks it, and in {split} no label is of some samples "
                f"only; use another metric, or give {split} other samples"
            )
        if task == "regression" and len(np.unique(labels)) < 2:
            raise DataError(
                f"objective.metric = {metric!r} explains what varies, and in {split} all labels are {labels[0, 0]:g}; use rmse or mae, "
                f"or give {split} other samples"
            )


def _may_be(arm: Arm, key: str, own: Scalar, value: Scalar) -> bool:
    """Whether a trial of the arm may have this value, where the job has its `own`."""
    drawn = arm.space.get(key, own)
    return value in (drawn if isinstance(drawn, tuple) else (drawn,))


def _with_absolute_paths(job: Job) -> Job:
    """Trials may run in another working directory."""
    data, backbone = job.data, of_bundle(job.backbone)
    if data.path not in NAMES and "://" not in data.path:
        data = data.model_copy(update={"path": str(Path(data.path).expanduser().absolute())})
    if data.tokenizer is not None:
        data = data.model_copy(update={"tokenizer": _absolute_encoder(data.tokenizer)})
    backbone = backbone.model_copy(update={"name": _absolute_encoder(backbone.name)})
    if backbone.weights not in ("pretrained", "random"):
        backbone = backbone.model_copy(update={"weights": str(Path(backbone.weights).expanduser().absolute())})
    features = job.features
    if features.path is None:
        features = features.model_copy(update={"path": str(job.folder.absolute().parent / "features")})
    elif "://" in features.path:
        locate(features.path)  # refuses what is no URI of a file system
    else:
        features = features.model_copy(update={"path": str(Path(features.path).expanduser().absolute())})
    folders = {"data": data, "backbone": backbone, "features": features, "results": str(job.folder.absolute())}
    return job.model_copy(update=folders)


def of_bundle(spec: BackboneSpec) -> BackboneSpec:
    """The backbone that `bundle/PATH` stands for: the bundle's own, as it was trained to. Raises BackboneError."""
    if not spec.name.startswith(BUNDLE):
        return spec
    if spec.weights != "pretrained":
        raise BackboneError(f"backbone.name = {spec.name!r} brings its weights; leave backbone.weights out")
    folder = published(Path(spec.name.removeprefix(BUNDLE)).expanduser().absolute())
    try:
        own = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["spec"]["backbone"]
        return spec.model_copy(update={"name": own["name"], "weights": str(folder), "pool": own["pool"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"backbone.name = {spec.name!r}: {folder} is no bundle ({error}); name its folder"
        ) from None


def _absolute_encoder(name: str) -> str:
    """A text encoder's name with the path of its folder, where that is what it names, made absolute."""
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    return f"{PREFIX}{folder.absolute()}" if name.startswith(PREFIX) and folder.is_dir() else name
