"""The catalogue: what each strategy trains and when, as a pure function of how many stages and epochs there are.

Stages are numbers here, counted from the input; `freeze` turns a phase into rules for a network's parameters. The head always
trains. Knobs that go with any strategy (`norm`, `layer_decay`, the head's start, `train.l2_sp`, `train.wise`) are not
strategies of their own, though some papers' names stand for a strategy with a knob: each entry says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from frostline.depths import cut_of, end_of
from frostline.spec import Freeze, Strategy
from frostline.trialspec import Config

ALL, NORMS, BIASES, ADAPTERS = "*", "norm/*", "*bias", "adapter/*"
"""Patterns of `KIND/NAME`: which parameters of a stage train."""


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs in which the same parameters train."""

    rates: Mapping[int, float]
    """Stage -> learning rate of what trains in it, relative to `train.lr`; the others are frozen."""
    epochs: int
    which: str = ALL
    """Of these stages' parameters those train whose `KIND/NAME` fits the pattern."""
    restart: bool = True
    """Whether schedule and optimizer begin anew; else the schedule runs on, and so do the moments of what trains already."""


@dataclass(frozen=True)
class Entry:
    """A strategy."""

    phases: Callable[[Freeze, range, int], list[Phase]]
    """Takes the knobs, the stages that are not frozen throughout (of those below the head), and the epochs."""
    about: str
    source: str


def together(freeze: Freeze, stages: range, epochs: int) -> list[Phase]:
    """All of these stages, from the first epoch to the last."""
    return [Phase(rates(freeze, stages), epochs)]


def parts(which: str) -> Callable[[Freeze, range, int], list[Phase]]:
    """Some parameters of each of these stages."""
    return lambda freeze, stages, epochs: [Phase(rates(freeze, stages), epochs, which)]


def surgical(freeze: Freeze, stages: range, epochs: int) -> list[Phase]:
    """One block of stages; those above it are frozen, and gradients pass through them."""
    return [Phase(rates(freeze, stages, stages[: freeze.span or 1]), epochs)]


def lp_ft(freeze: Freeze, stages: range, epochs: int) -> list[Phase]:
    """The head alone, then all."""
    if not stages:
        return together(freeze, stages, epochs)
    alone = head_epochs(freeze, epochs)
    phases = [Phase({}, alone), Phase(rates(freeze, stages), epochs - alone)]
    return [phase for phase in phases if phase.epochs]


def gradual(freeze: Freeze, stages: range, epochs: int) -> list[Phase]:
    """The head alone, then one stage more every few epochs, from the last to the first."""
    phases, every = [], head_epochs(freeze, epochs)
    for unfrozen in range(len(stages) + 1):
        left = epochs - every * unfrozen
        if left > 0:
            last = unfrozen == len(stages)
            trained = stages[len(stages) - unfrozen :]
            phases.append(Phase(rates(freeze, stages, trained), left if last else min(every, left), restart=False))
    return phases


def rates(freeze: Freeze, stages: range, trained: Sequence[int] | None = None) -> dict[int, float]:
    """Relative learning rates of `trained` (all of `stages` when not given): 1 in the last stage below the head, times
    `layer_decay` a stage towards the input, and geometrically down to `lr_ratio` in the network's first stage."""
    last = stages.stop - 1
    return {
        stage: freeze.layer_decay ** (last - stage) * (freeze.lr_ratio or 1.0) ** ((last - stage) / max(1, last))
        for stage in (stages if trained is None else trained)
    }


CATALOGUE: dict[Strategy, Entry] = {
    "full": Entry(together, "everything trains", "the usual fine-tuning"),
    "linear_probe": Entry(
        together, "only the head trains; with `head.depth` it stands after an earlier stage", "Alain and Bengio 2016"
    ),
    "freeze_depth": Entry(together, "the first `depth` stages are frozen", "Yosinski et al. 2014"),
    "freeze_embed": Entry(together, "the first stage is frozen: the stem, or the embeddings", "Kumar et al. 2022b"),
    "surgical": Entry(surgical, "`span` stages train, those before (`depth`) and after are frozen", "Lee et al. 2023"),
    "layer_decay": Entry(
        together, "`full`; each stage at `layer_decay` of the next one's rate", "Clark et al. 2020; BEiT"
    ),
    "discriminative": Entry(
        together,
        "`full`; rates rise geometrically from `lr_ratio` in the first stage to 1 in the last",
        "Howard and Ruder 2018",
    ),
    "gradual": Entry(
        gradual, "the head first, one stage more `every` so many epochs", "Howard and Ruder 2018 (ULMFiT)"
    ),
    "lp_ft": Entry(lp_ft, "the head alone for `probe_share` of the epochs, then everything", "Kumar et al. 2022a"),
    "zero_head": Entry(together, "`full` from a head of zeros: the control for `lp_ft`", "Kumar et al. 2022a"),
    "norm_only": Entry(parts(NORMS), "scale and shift of the norm layers", "Frankle et al. 2021"),
    "bias_only": Entry(parts(BIASES), "the biases, those of norm layers included", "Ben Zaken et al. 2022 (BitFit)"),
    "lora": Entry(parts(ADAPTERS), "updates of rank `rank` to linear layers and 1x1 convolutions", "Hu et al. 2022"),
    "dora": Entry(parts(ADAPTERS), "the same, with the size of each weight's columns apart", "Liu et al. 2024"),
    "auto_rgn": Entry(
        together,
        "each tensor's rate follows its gradient's norm relative to its own, anew each epoch",
        "Lee et al. 2023",
    ),
    "scratch": Entry(together, "`full` from random weights: what is transfer worth?", "He et al. 2019"),
}


def phases_of(freeze: Freeze, cut: int, end: int, epochs: int) -> list[Phase]:
    """The phases of a strategy over so many epochs, on a backbone whose first `cut` stages are frozen throughout, under a
    head on the first `end`."""
    return CATALOGUE[freeze.strategy].phases(freeze, range(cut, end), epochs)


def run_cuts(config: Config, stages: int, epochs: int) -> dict[int, int]:
    """Where the first `epochs` epochs of a trial began to train, on a backbone with so many stages: first stage that trained
    (where only the head did, the head's own depth) -> epochs."""
    cut, end, found, left = cut_of(config, stages), end_of(config.head, stages), Counter[int](), epochs
    for phase in phases_of(config.freeze, cut, end, config.train.epochs):
        found[min(phase.rates, default=end)] += min(phase.epochs, left)
        left -= min(phase.epochs, left)
    return dict(found)


def judged_epoch(config: Config, epoch: int) -> int:
    """The epoch as early stopping counts it: from when the trial has unfrozen what it is going to unfreeze first, and its
    learning rates have risen; 0 before."""
    alone = head_epochs(config.freeze, config.train.epochs)
    return max(0, epoch - alone - int(config.train.warmup * (config.train.epochs - alone)))


def head_epochs(freeze: Freeze, epochs: int) -> int:
    """For how many epochs a strategy with phases trains the head alone, before it unfreezes anything; 0 for the others."""
    if freeze.strategy == "lp_ft":
        return round((0.5 if freeze.probe_share is None else freeze.probe_share) * epochs)
    return min(freeze.every or 1, epochs) if freeze.strategy == "gradual" else 0
