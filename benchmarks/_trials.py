"""Trials without a study, and what their parts take in bare PyTorch: for bounds that hold in the run that they judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from frostline.cuts import resume
from frostline.features import EVAL_BATCH, Feed, on_device
from frostline.freeze import Network, apply_plan, compile_plan, train_mode
from frostline.spec import Job
from frostline.training import build_optimizer
from frostline.trial import head_of, origin_of
from frostline.trialspec import TrialSpec, configure, search_seeds, trial_of
from frostline.world import World


def search_trial(job: Job, arm: str, number: int, values: Mapping[str, Any], *, cached: bool) -> TrialSpec:
    """A search trial of a prepared job with these values; `cached` ones read activations."""
    seed, seeds = search_seeds(job, arm, number)
    return trial_of(
        job,
        configure(job, job.arms[arm], values),
        seeds,
        trial_id=f"{arm}-{number:05d}",
        arm=arm,
        number=number,
        round="search",
        seed=seed,
        cached=cached,
    )


@dataclass(frozen=True)
class Parts:
    """Seconds per image of what a trial does."""

    frozen_s: float
    """A pass through the frozen stages."""
    step_s: float
    """A training step of the rest, in batches of the trial's size."""
    rest_s: float
    """A pass through the rest."""


def parts_of(spec: TrialSpec, seconds: float = 1.0) -> Parts:
    """Timed now, in a plain loop on inputs that lie in memory, each part for so many seconds."""
    world = World.here(spec.resources)
    origin, feed, config = origin_of(spec, world), Feed(), spec.config.train
    plan = compile_plan(spec.config.freeze, origin.backbone.stages)
    samples = origin.dataset.indices("train")[: max(EVAL_BATCH, config.batch_size)]
    network = Network(on_device(origin.backbone, world.device), head_of(spec, origin))
    (applied,) = apply_plan(plan, network, origin.backbone)
    resume(network.backbone, origin.cut(plan.cut))
    optimizer = build_optimizer(network, applied, config)

    def frozen() -> torch.Tensor:
        feed.forget_passes()
        return feed.pass_through(origin, {plan.cut}, samples[:EVAL_BATCH], None)[plan.cut]

    activations = frozen()
    inputs = torch.cat([activations] * -(-config.batch_size // len(activations)))[: config.batch_size]
    labels = torch.from_numpy(origin.dataset.labels[samples[: len(inputs)]]).to(world.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()

    @torch.no_grad()
    def rest() -> None:
        network(activations)

    with torch.inference_mode():
        frozen_s = _mean_s(frozen, seconds) / len(activations)
    train_mode(network, applied)
    step_s = _mean_s(step, seconds) / len(inputs)
    network.eval()
    return Parts(frozen_s, step_s, _mean_s(rest, seconds) / len(activations))


def _mean_s(call: Callable[[], object], seconds: float) -> float:
    """Of calls after a first one. The fastest, or the median, would be luck on a machine with other guests, which no run of minutes
    has."""
    call()
    calls, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        call()
        calls += 1
    return passed / calls
