"""What a search draws from a job: configurations, their seeds, and all that one trial needs, as frozen models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from frostline.models import Frozen, digest
from frostline.seeds import Seeds, derive_seed
from frostline.spec import (
    SEARCHABLE,
    Arm,
    Augment,
    BackboneSpec,
    Data,
    Features,
    Freeze,
    Head,
    Job,
    Objective,
    Resources,
    Round,
    Scaling,
    Train,
    is_searched,
)


class Config(Frozen):
    """What a search varies: one configuration."""

    freeze: Freeze
    head: Head
    train: Train

    @model_validator(mode="after")
    def _zero_head_is_one(self) -> Config:
        if self.freeze.strategy == "zero_head" and self.head.init != "zero":
            if "init" in self.head.model_fields_set:
                raise ValueError(f"strategy = 'zero_head' starts at head.init = 'zero', not {self.head.init!r}")
            object.__setattr__(self, "head", self.head.model_copy(update={"init": "zero"}))
        return self

    @property
    def id(self) -> str:
        """Equal for equal configurations: 16 hex digits of the SHA-256 of their canonical JSON."""
        return digest(self.model_dump(mode="json"))


class TrialSpec(Frozen):
    """All that one trial needs to run anywhere: frozen, JSON in and out."""

    trial_id: str
    arm: str
    number: int
    """Counts the arm's proposals; a confirmation has its finalist's number."""
    round: Round
    seed: int
    seeds: Seeds
    data: Data
    backbone: BackboneSpec
    config: Config
    augment: Augment
    features: Features
    cached: bool = False
    """Whether activations at the trial's cut are read from the feature store, where they have been put before."""
    start_stored: bool = False
    """Whether the features that head.init = "probe" starts from are read from there."""
    objective: Objective
    resources: Resources
    scaling: Scaling = Scaling()


def starting_point(backbone: BackboneSpec, config: Config, seeds: Seeds) -> BackboneSpec:
    """The backbone that a configuration starts from: the job's, or the same network from random weights."""
    if config.freeze.strategy != "scratch":
        return backbone
    return backbone.model_copy(update={"weights": "random", "seed": seeds.init})


def trial_of(job: Job, config: Config, seeds: Seeds, **own: Any) -> TrialSpec:
    """A trial of `config` on what all trials of the job share, each of which may be given anew; `own` is what they do not."""
    shared = {name: getattr(job, name) for name in ("data", "augment", "features", "objective", "resources", "scaling")}
    shared["backbone"] = starting_point(job.backbone, config, seeds)
    return TrialSpec(config=config, seeds=seeds, **(shared | own))


def search_seeds(job: Job, arm: str, number: int) -> tuple[int, Seeds]:
    """A search trial's own seed, which drives head initialisation and dropout; all else is shared by the study."""
    seed = derive_seed(job.seed, "search", arm, number)
    shared = {name: derive_seed(job.seed, name) for name in ("split", "subset", "augment", "order", "init")}
    return seed, Seeds(**shared, head=derive_seed(seed, "head"), dropout=derive_seed(seed, "dropout"))


def confirm_seeds(job: Job, index: int) -> tuple[int, Seeds]:
    """Seed number `index` of the confirmations, the same in every arm (paired) and, lying above 2^30, never a search seed.
    It redraws train subset, augmentation, head, order and dropout together; the split stays."""
    seed = (1 << 30) + derive_seed(job.seed, "confirm", index)
    redrawn = {name: derive_seed(seed, name) for name in ("subset", "augment", "order", "head", "dropout", "init")}
    return seed, Seeds(split=derive_seed(job.seed, "split"), **redrawn)


def configure(job: Job, arm: Arm, values: Mapping[str, Any]) -> Config:
    """The configuration of `arm` at `values` (dotted key -> value): the job's sections with the values laid over them.

    Raises pydantic's ValidationError where the values do not make a valid configuration.
    """
    held = {path: dim for path, dim in arm.space.items() if not is_searched(path, dim)}
    sections = {name: getattr(job, name).model_dump(exclude_unset=True) for name in SEARCHABLE}
    sections["freeze"] |= {"strategy": arm.strategy}
    for path, value in {**held, **values}.items():
        section, key = path.split(".", 1)
        sections[section][key] = value
    return Config.model_validate(sections)
