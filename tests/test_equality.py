"""Fast paths give what the plain path gives (P4): activations read from the store, a live pass shared, and lanes of a pack,
against each trial alone on live images. Every strategy and head joins by adding its keys to `CONFIGS`.

In float64 the losses and scores agree to 1e-6, and so do the logits on test. In float32 the order of sums differs between
batches of another size, and AdamW amplifies the last bit: losses agree to 1e-4, and configurations rank the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline import backbone
from frostline.extract import extract, survey
from frostline.features import Feed
from frostline.outcome import EpochRecord, Outcome
from frostline.pack import run_pack
from frostline.packing import pack_key
from frostline.prepare import prepare
from frostline.spec import Arm, Features, Task
from frostline.testing import TOY_BACKBONE, target_table, text_job, toy_job
from frostline.trialspec import TrialSpec, configure, confirm_seeds, search_seeds, trial_of
from frostline.work import Survey
from frostline.world import World

STAGES = 3
CONFIGS = st.fixed_dictionaries(
    {
        "freeze.depth": st.integers(1, STAGES),
        "freeze.norm": st.sampled_from(["frozen", "affine", "batch", "recalibrate"]),
        "head.depth": st.sampled_from([1, 2, "all"]),
        "head.hidden": st.sampled_from([0, 4, 9]),
        "head.dropout": st.sampled_from([0.0, 0.4]),
        "head.init": st.sampled_from(["random", "zero", "probe"]),
        "train.optimizer": st.sampled_from(["adamw", "sgd"]),
        "train.lr": st.sampled_from([1e-4, 1e-3]),
        "train.head_lr": st.sampled_from([1e-3, 1e-2]),
        "train.weight_decay": st.sampled_from([0.0, 0.1]),
        "train.label_smoothing": st.sampled_from([0.0, 0.1]),
        "train.clip_norm": st.sampled_from([0.5, 100.0]),
        "train.ema": st.sampled_from([0.5, 0.9]),
        "train.epochs": st.integers(1, 3),
    }
)
VIEWS = st.sampled_from([0, 2, "live"])


@pytest.fixture(params=["float32", "float64"], scope="module")
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """What everything computes in; backbones are loaded anew in it."""
    torch.set_default_dtype(getattr(torch, request.param))
    backbone._load.cache_clear()
    yield request.param
    torch.set_default_dtype(torch.float32)
    backbone._load.cache_clear()


def specs_of(
    root: Path,
    dtype: str,
    views: int | str,
    configs: Sequence[Mapping[str, Any]],
    round_: str,
    name: str | None = TOY_BACKBONE,
    task: Task = "classification",
) -> list[TrialSpec]:
    """Trials of the toy job, or, without the name of a backbone, of the one on texts."""
    options = ["train.batch_size=16", *([f"backbone.name={name}"] if name else [])]
    if task == "classification":
        job = prepare((toy_job if name else text_job)(root / "study", [*options, "data.per_class=6"])).job
    else:
        data = {"path": str(target_table(root / f"{task}.parquet", task)), "task": task, "image_size": 16}
        job = prepare(toy_job(root / "study", options, data=data)).job
    specs = []
    for number, config in enumerate(configs):
        arm = Arm(strategy=config.get("strategy", "freeze_depth"))
        values = {path: value for path, value in config.items() if path != "strategy"}
        seed, seeds = search_seeds(job, "freeze", number) if round_ == "search" else confirm_seeds(job, 0)
        specs.append(
            trial_of(
                job,
                configure(job, arm, values),
                seeds,
                trial_id=f"freeze-{number:05d}",
                arm="freeze",
                number=number,
                round="search" if round_ == "search" else "confirm",
                seed=seed,
                augment=job.augment.model_copy(update={"views": views, "colour": 0.2}),
                features=Features.model_construct(**{**dict(job.features), "dtype": dtype}),
            )
        )
    return specs


def reading(spec: TrialSpec) -> TrialSpec:
    """The trial, but from stored activations."""
    return spec.model_copy(update={"cached": True, "start_stored": spec.config.head.init == "probe"})


class Ran:
    """Trials, as they ran together: what they reported and what they left."""

    def __init__(self, specs: Sequence[TrialSpec]) -> None:
        self.records: dict[str, list[EpochRecord]] = {spec.trial_id: [] for spec in specs}
        self.outcomes: dict[str, Outcome] = {}
        self.feed, world = Feed(), World.here(specs[0].resources)
        for shard in survey(Survey(tuple(specs), None, (), 1), world, lambda *_: None).shards:
            extract(shard, self.feed, world)
        run_pack(specs, feed=self.feed, world=world, report=self.hear, finish=self.outcomes.update)

    def hear(self, records: Mapping[str, EpochRecord]) -> dict[str, bool]:
        for trial_id, record in records.items():
            self.records[trial_id].append(record)
        return dict.fromkeys(records, True)

    def figures(self, trial_id: str) -> np.ndarray:
        assert self.outcomes[trial_id].row["status"] == "complete", self.outcomes[trial_id].row["error"]
        return np.array([[each.train_loss, each.val_loss] for each in self.records[trial_id]])

    def probabilities(self, trial_id: str) -> np.ndarray:
        rows = self.outcomes[trial_id].predictions
        return np.array([row["probabilities"] if "probabilities" in row else [row["predicted_value"]] for row in rows])


def check(plain: Ran, fast: Ran, trial_id: str, dtype: str) -> None:
    tolerance = {"float64": 1e-6, "float32": 1e-4}[dtype]
    np.testing.assert_allclose(fast.figures(trial_id), plain.figures(trial_id), rtol=tolerance)
    for name in (
        "trainable_params",
        "total_params",
        "freeze_depth",
        "head_depth",
        "applied_lrs",
        "audit",
        "n_train",
        "n_val",
    ):
        assert fast.outcomes[trial_id].row[name] == plain.outcomes[trial_id].row[name]
    assert fast.outcomes[trial_id].row.keys() == plain.outcomes[trial_id].row.keys()


def test_half_precision_of_the_store_rounds_live_trials_alike(tmp_path: Path) -> None:
    for cut, end in [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2), (3, 1)]:
        config = {"freeze.depth": cut, "head.hidden": 4, "head.depth": end}
        (spec,) = specs_of(tmp_path, "float16", 0, [config], "confirm")
        plain, fast = Ran([spec]), Ran([reading(spec)])
        check(plain, fast, spec.trial_id, "float32")
        (exact,) = specs_of(tmp_path, "float32", 0, [config], "confirm")
        assert (Ran([exact]).figures(spec.trial_id) != plain.figures(spec.trial_id)).any()


def test_half_precision_keeps_what_is_padding(tmp_path: Path) -> None:
    (spec,) = specs_of(tmp_path, "float16", 0, [{"freeze.depth": 2, "train.lr": 1e-3}], "confirm", None)
    check(Ran([spec]), Ran([reading(spec)]), spec.trial_id, "float32")


@settings(max_examples=6)
@given(config=CONFIGS, views=VIEWS)
def test_a_trial_on_stored_activations_is_the_trial_on_images(
    dtype: str, tmp_path_factory: pytest.TempPathFactory, config: Mapping[str, Any], views: int | str
) -> None:
    (spec,) = specs_of(tmp_path_factory.mktemp("cached"), dtype, views, [config], "confirm")
    plain, fast = Ran([spec]), Ran([reading(spec)])
    check(plain, fast, spec.trial_id, dtype)
    np.testing.assert_allclose(
        fast.probabilities(spec.trial_id), plain.probabilities(spec.trial_id), atol=1e-6 if dtype == "float64" else 1e-4
    )
    assert set(fast.outcomes[spec.trial_id].bundle) == set(plain.outcomes[spec.trial_id].bundle)
    assert plain.outcomes[spec.trial_id].row["inputs"] == "images"
    assert fast.outcomes[spec.trial_id].row["inputs"] == "features"


STRATEGIES = {
    "gradual": {},
    "lp_ft": {},
    "surgical": {},
    "layer_decay": {"freeze.layer_decay": 0.5},
    "discriminative": {"freeze.lr_ratio": 0.1},
    "norm_only": {},
    "bias_only": {},
    "auto_rgn": {"freeze.norm": "affine"},
    "lora": {},
    "dora": {},
}
"""With a frozen prefix whose activations can be stored."""
ADAPTABLE = "timm/test_efficientnet"
"""With 1x1 convolutions, which the toy backbone has not."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_same_on_stored_activations_and_on_a_shared_pass(
    dtype: str, tmp_path: Path, strategy: str
) -> None:
    values = {"strategy": strategy, "freeze.depth": 1, "train.epochs": 4, "train.lr": 1e-3, **STRATEGIES[strategy]}
    name = ADAPTABLE if strategy in ("lora", "dora") else TOY_BACKBONE
    (spec,) = specs_of(tmp_path / "stored", dtype, 2, [values], "confirm", name)
    plain, fast = Ran([spec]), Ran([reading(spec)])
    check(plain, fast, spec.trial_id, dtype)
    assert fast.outcomes[spec.trial_id].row["inputs"] == "features"
    pair = [values, {**values, "train.lr": 1e-4}]
    shared = specs_of(tmp_path / "live", dtype, "live", pair, "search", name)
    together = Ran([reading(spec) for spec in shared])
    for spec in shared:
        check(Ran([spec]), together, spec.trial_id, dtype)


@settings(max_examples=5)
@given(configs=st.lists(CONFIGS, min_size=2, max_size=5), views=VIEWS)
def test_a_lane_of_a_pack_is_the_trial_alone(
    dtype: str, tmp_path_factory: pytest.TempPathFactory, configs: list[dict[str, Any]], views: int | str
) -> None:
    if views != "live":  # lanes that share no live pass are heads
        configs = [{**config, "freeze.depth": STAGES, "head.depth": configs[0]["head.depth"]} for config in configs]
    plain = specs_of(tmp_path_factory.mktemp("pack"), dtype, views, configs, "search")
    cached = [reading(spec) for spec in plain]
    assert len({pack_key(spec, STAGES) for spec in cached}) == 1
    together = Ran(cached)
    alone = {spec.trial_id: Ran([spec]) for spec in plain}
    for trial_id, ran in alone.items():
        check(ran, together, trial_id, dtype)
    scores = {trial_id: ran.figures(trial_id)[-1, 1] for trial_id, ran in alone.items()}
    ranked = sorted(scores, key=lambda trial_id: together.figures(trial_id)[-1, 1])
    gaps = np.diff([scores[trial_id] for trial_id in ranked])
    assert (gaps > -1e-4).all(), "lanes rank as the trials alone do"


def test_a_closed_form_head_is_the_same_in_a_pack(dtype: str, tmp_path: Path) -> None:
    values = {"freeze.depth": STAGES, "head.hidden": 0, "head.init": "probe"}
    configs = [{**values, "train.head_lr": lr} for lr in (1e-3, 1e-2)]
    plain = specs_of(tmp_path, dtype, 0, configs, "search")
    together = Ran([reading(spec) for spec in plain])
    for spec in plain:
        check(Ran([spec]), together, spec.trial_id, dtype)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
@pytest.mark.parametrize("init", ["random", "probe"])
def test_other_targets_give_the_same_from_stored_activations_and_in_a_pack(
    dtype: str, tmp_path: Path, task: Task, init: str
) -> None:
    own = {"head.init": init, "head.hidden": 4, "train.epochs": 2}
    weighed = {"train.class_weights": "balanced", "train.label_smoothing": 0.1} if task == "multilabel" else {}
    (spec,) = specs_of(tmp_path, dtype, 0, [{**own, **weighed, "freeze.depth": 2}], "confirm", task=task)
    plain, fast = Ran([spec]), Ran([reading(spec)])
    check(plain, fast, spec.trial_id, dtype)
    tolerance = 1e-6 if dtype == "float64" else 1e-4
    found, expected = fast.probabilities(spec.trial_id), plain.probabilities(spec.trial_id)
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1.0, np.abs(expected).max()))
    configs = [{**own, **weighed, "freeze.depth": STAGES, "train.head_lr": lr} for lr in (1e-3, 1e-2)]
    alone = specs_of(tmp_path, dtype, 0, configs, "search", task=task)
    together = Ran([reading(spec) for spec in alone])
    for spec in alone:
        check(Ran([spec]), together, spec.trial_id, dtype)


@pytest.mark.parametrize("strategy", ["freeze_depth", *STRATEGIES])
def test_texts_give_the_same_from_stored_activations(dtype: str, tmp_path: Path, strategy: str) -> None:
    """At every cut: what is padding goes with the activations."""
    values = {"strategy": strategy, "train.epochs": 4, "train.lr": 1e-3, **STRATEGIES.get(strategy, {})}
    for depth in range(1, 5) if strategy == "freeze_depth" else (2,):
        (spec,) = specs_of(tmp_path, dtype, 0, [{**values, "freeze.depth": depth}], "confirm", None)
        plain, fast = Ran([spec]), Ran([reading(spec)])
        check(plain, fast, spec.trial_id, dtype)
        tolerance = 1e-6 if dtype == "float64" else 1e-4
        found, expected = fast.probabilities(spec.trial_id), plain.probabilities(spec.trial_id)
        np.testing.assert_allclose(found, expected, atol=tolerance)
        assert plain.outcomes[spec.trial_id].row["inputs"] == "texts"
        assert fast.outcomes[spec.trial_id].row["inputs"] == "features"


@pytest.mark.parametrize("end", [1, 3, "all"])
def test_texts_give_the_same_in_a_pack(dtype: str, tmp_path: Path, end: int | str) -> None:
    values = {"freeze.depth": "all", "head.depth": end, "head.hidden": 4, "head.dropout": 0.4, "train.epochs": 2}
    configs = [{**values, "train.head_lr": lr, "head.init": init} for lr, init in ((1e-3, "random"), (1e-2, "probe"))]
    plain = specs_of(tmp_path, dtype, 0, configs, "search", None)
    together = Ran([reading(spec) for spec in plain])
    for spec in plain:
        check(Ran([spec]), together, spec.trial_id, dtype)
