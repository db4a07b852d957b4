"""A compiled training: what an uncompiled one gives, but for rounding; to the bit when it is resumed; and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

import frostline
from _freezing import EPOCHS, batches, freezing, network_of
from _workers import together
from frostline import results
from frostline.backbone import Backbone, BackboneError, load_backbone
from frostline.checkpoint import load_training, save_training
from frostline.prepare import prepare
from frostline.spec import BackboneSpec, Train
from frostline.testing import TOY_BACKBONE, toy_job
from frostline.training import Seeding, Training
from frostline.world import ALONE, World

SAMPLES = 10  # in batches of 4, 4 and 2: two shapes
TOLERANCE = 1e-4  # of weights, and of losses, after a few steps of SGD

slow = pytest.mark.slow  # a program takes seconds to compile


def training_of(backbone: Backbone, strategy: str, world: World = ALONE, **config: Any) -> Training:
    network, phases = network_of(backbone, freezing(strategy), dropout=0.3)
    data = batches(backbone.size, SAMPLES)
    return Training(
        network,
        phases,
        Train(epochs=EPOCHS, batch_size=4, optimizer="sgd", lr=1e-2, head_lr=1e-2, **config),
        train=data,
        val=data,
        metric="nll",
        seeding=Seeding(3, 4),
        autocast=None,
        world=world,
    )


def run(training: Training) -> dict[str, Tensor]:
    for _ in training.steps():
        pass
    return training.network.state_dict()


def check_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=TOLERANCE, rtol=TOLERANCE, msg=name)


@slow
@pytest.mark.parametrize("strategy", ["full", "freeze_depth", "gradual", "lp_ft"])
def test_it_trains_what_it_trains_uncompiled(toy: Backbone, strategy: str) -> None:
    """Dropout draws the same, in the backbone and in the head; whole graphs are compiled, one for each shape and phase."""
    plain, fast = training_of(toy, strategy), training_of(toy, strategy, compile=True)
    wanted = run(plain)
    counters.clear()
    check_close(run(fast), wanted)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 2
    assert "recompile_limit" not in str(counters["unimplemented"])
    for found, record in zip(fast.records, plain.records, strict=True):
        assert found.train_loss == pytest.approx(record.train_loss, abs=TOLERANCE)


@slow
def test_a_phase_of_the_head_alone_is_not_compiled(toy: Backbone) -> None:
    counters.clear()
    compiled, plain = (run(training_of(toy, "linear_probe", compile=each)) for each in (True, False))
    assert not counters["stats"]
    assert all(torch.equal(compiled[name], tensor) for name, tensor in plain.items())


@slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_it_goes_on_to_the_bit(toy: Backbone, epoch: int) -> None:
    through, left, again = (training_of(toy, "gradual", compile=True) for _ in range(3))
    wanted = run(through)
    walk = left.steps()
    while next(walk) is None or left.epoch < epoch:
        pass
    load_training(again, save_training(left, "this"), "this")
    torch.compiler.reset()
    for name, tensor in run(again).items():
        assert torch.equal(tensor, wanted[name]), name


def _trained(world: World, compiles: bool) -> dict[str, Tensor]:
    toy = load_backbone(BackboneSpec(name=TOY_BACKBONE, weights="random"), image_size=16)
    for module in toy.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # whose noise is each worker's own
    return run(training_of(toy, "full", world, compile=compiles))


@slow
def test_two_workers_compile_what_one_trains() -> None:
    (alone,) = together(1, _trained, False)
    for found in together(2, _trained, True):
        check_close(found, alone)


@slow
@pytest.mark.parametrize("cache", ["all", "none"])
def test_a_search_compiles_trials_on_stored_features_too_and_says_the_same(tmp_path: Path, cache: str) -> None:
    options = ["search.trials=3", "search.sampler=random", "search.pruner.kind=none", "confirm.seeds=1"]
    options += [
        f"features.cache={cache}",
        "freeze.norm=affine",
        "train.optimizer=sgd",
        'arms.freeze.space."freeze.depth"=[1]',
    ]
    plain = frostline.search(toy_job(tmp_path / "a" / "study", options), inline=True)
    fast = frostline.search(toy_job(tmp_path / "b" / "study", [*options, "train.compile=true"]), inline=True)
    rows, wanted = ({row["trial_id"]: row for row in results.read_trials(study).to_pylist()} for study in (fast, plain))
    assert rows.keys() == wanted.keys()
    for trial_id, row in rows.items():
        assert (row["status"], row["audit"], row["inputs"]) == ("complete", "passed", wanted[trial_id]["inputs"])
        assert row["val_nll"] == pytest.approx(wanted[trial_id]["val_nll"], abs=1e-3)
        assert row["lanes"] == 1
    found, expected = (load_file(study / "bundle" / "model.safetensors") for study in (fast, plain))
    assert found.keys() == expected.keys()


def test_it_is_not_for_parameters_that_are_spread(tmp_path: Path) -> None:
    for options in (["train.compile=true"], ['arms.freeze.space."train.compile"=[true, false]']):
        prepare(toy_job(tmp_path, options))
        with pytest.raises(
            BackboneError, match=r'arms\.freeze: train\.compile = true is not for scaling\.mode = "fsdp"'
        ):
            prepare(toy_job(tmp_path, [*options, "scaling.mode=fsdp", "scaling.workers=2"]))


LACKING = """
from torch import nn
from frostline.compiling import compiled
from frostline.freeze import Network
compiled(Network(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))))
"""


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LACKING], env=environment, capture_output=True, text=True)
    assert "ValueError: train.compile = true: torch.compile needs a C++ compiler on a CPU" in done.stderr
    assert "install g++" in done.stderr
