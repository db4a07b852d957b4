"""`frostline plan`: what a search would run and what it would cost, said before anything is spent."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from frostline.backbone import stage_table
from frostline.cache import cache_root
from frostline.costs import Choice, StageTimes
from frostline.estimate import Estimate, Sizes, arm_cuts, cut_choices, estimate, local_slots, mean_bytes, stage_times
from frostline.inputs import Images
from frostline.models import Range
from frostline.prepare import Prepared, prepare
from frostline.progress import Progress
from frostline.propose import Proposer
from frostline.spec import Arm, Job
from frostline.stages import StageCost
from frostline.text import plain

ONE = {"image": "an image", "text": "a text"}


def render_plan(job: Job, console: Console) -> None:
    """Print what a search of `job` would run and cost; 100 columns suffice.

    Decodes the data into the cache, loads the backbone and times a few steps. Raises a ValueError where a search would.
    """
    with Progress(Console(stderr=True)) as progress:
        prepared = prepare(job, progress.decoding)
    job, dataset, depths = prepared.job, prepared.dataset, len(prepared.backbone.stages)
    share = job.search.trials // max(1, len(job.arms))
    proposers = {name: Proposer(job, name, depths, share) for name in job.arms}  # refuses what a search would refuse
    noun, stages = prepared.backbone.inputs.noun, stage_table(prepared.backbone, dataset.size)
    sizes = Sizes(
        n_train=prepared.n_train,
        n_val=len(dataset.indices("val")),
        n_test=len(dataset.indices("test")),
        classes=len(dataset.classes),
        feature_dim=prepared.backbone.feature_dim,
        inputs_bytes=dataset.inputs.nbytes,
    )
    console.print(_stage_table(stages, noun), "", _facts(_about(prepared, stages, sizes)), sep="\n")
    for name, arm in job.arms.items():
        title = plain(
            f"arm {name}: {arm.strategy}, {proposers[name].kind} sampler, {share:,} trials" if share else arm.strategy
        )
        console.print("", title, _facts(_space(job, arm, depths)), sep="\n")
    console.print()
    times = stage_times(prepared)
    choices = cut_choices(prepared, times)
    stored = {choice.cut: choice.image_bytes or 0 for choice in choices if choice.stored}
    slots = local_slots(job.resources, os.cpu_count() or 1, torch.cuda.device_count())
    found = estimate(job, stages, sizes, times, max(1, slots), stored, mean_bytes(prepared))
    if choices:
        console.print(_choice_table(choices, noun), "", sep="\n")
    console.print(_cost_table(found, times.device, noun), "", _facts(_grounds(job, times, found, slots)), sep="\n")


def _stage_table(stages: Sequence[StageCost], noun: str) -> Table:
    """A line a stage, under the freeze depth that freezes it last."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("freeze\ndepth", "last\nfrozen stage", "para-\nmeters", "\nshare", "frozen\nshare"):
        table.add_column(name, justify="left" if "stage" in name else "right", overflow="fold")
    for name in (
        f"MFLOPs\n{ONE[noun]}",
        "\nshare",
        f"KiB {ONE[noun]}\nat the cut",
    ):
        table.add_column(name, justify="right")
    table.add_row("0", "none", "", "", "0.0%", "", "", "")
    frozen = 0.0
    for depth, stage in enumerate(stages, 1):
        frozen += stage.parameter_share
        parameters = f"{stage.parameters:,}", f"{stage.parameter_share:.1%}", f"{frozen:.1%}"
        flops = f"{stage.flops / 1e6:,.1f}", f"{stage.flop_share:.1%}"
        kept = "-" if stage.cut_bytes is None else f"{stage.cut_bytes / 1024:,.1f}"
        table.add_row(str(depth), plain(stage.name), *parameters, *flops, kept)
    return table


OF = {"classification": "{:,} classes, ", "multilabel": "any of {:,} labels, ", "regression": "a number each, "}


def _about(prepared: Prepared, stages: Sequence[StageCost], sizes: Sizes) -> Iterator[tuple[str, str]]:
    data, backbone, dataset = prepared.job.data, prepared.backbone, prepared.dataset
    drawn = f" of {len(dataset.indices('train')):,} ({data.per_class:,} a class)" if data.per_class else ""
    yield "backbone", f"{backbone.name}, weights {backbone.weights_hash}"
    yield "", f"{sum(stage.parameters for stage in stages):,} parameters, {sizes.feature_dim:,} features"
    yield "data", data.path
    yield "", f"{OF[dataset.target.task].format(sizes.classes)}{_inputs(prepared)}"
    counts = f"train {sizes.n_train:,}{drawn}, val {sizes.n_val:,}, test {sizes.n_test:,}"
    yield "", f"{counts}, excluded {len(dataset.excluded):,}"


def _inputs(prepared: Prepared) -> str:
    dataset, inputs = prepared.dataset, prepared.backbone.inputs
    if isinstance(inputs, Images):
        return f"images of {dataset.size} x {dataset.size} pixels"
    assert isinstance(dataset.inputs, np.ndarray), "tokens are kept"
    full = float((dataset.inputs[:, -1, 0] != inputs.pad).mean())
    cut = f"; {full:.1%} of them have as many or more, and lose what is beyond" if full else ", which none reaches"
    return f"texts of up to {dataset.size} tokens{cut}"


def _space(job: Job, arm: Arm, stages: int) -> Iterator[tuple[str, str]]:
    cuts = arm_cuts(job, arm, stages)
    yield "stages frozen", ", ".join(map(str, cuts)) + f" ({stages}: only the head trains)" * (stages in cuts)
    for path, entry in arm.space.items():
        if path == "freeze.depth":
            continue
        if path == "head.depth" and entry == "all":
            entry = tuple(range(1, stages + 1))
        if isinstance(entry, Range):
            how = ", log" if entry.log else f" by {entry.step:g}" if entry.step else ""
            yield path, f"{entry.low:g} to {entry.high:g}{how}"
        else:
            yield path, ", ".join(map(str, entry)) if isinstance(entry, tuple) else f"{entry} (held)"


def _choice_table(choices: Sequence[Choice], noun: str) -> Table:
    """A line a cut: whether its activations are stored, what that gains, what it takes, and why."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("freeze\ndepth", "\nactivations", "\ngain", "KiB {}\n{}".format(*ONE[noun].split())):
        table.add_column(name, justify="left" if "activations" in name else "right", no_wrap=True)
    table.add_column("\nwhy", overflow="fold")
    for choice in choices:
        gain = "-" if choice.gain is None else f"{choice.gain:.3g}x"
        size = "-" if choice.image_bytes is None else f"{choice.image_bytes / 1024:,.1f}"
        kept = "stored" if choice.stored else "not stored"
        table.add_row(str(choice.cut), kept, gain, size, choice.reason)
    return table


def _cost_table(found: Estimate, device: str, noun: str) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    for name in ("", "expected", "at most"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("trials", *[f"{found.trials:,}"] * 2)
    table.add_row("confirmations", *[f"{found.confirmations:,}"] * 2)
    costs, kind = (found.expected, found.at_most), "CPU" if device == "cpu" else "GPU"
    table.add_row(f"{noun}s forward", *(f"{cost.images_forward:,.0f}" for cost in costs))
    table.add_row(f"{noun}s backward", *(f"{cost.images_backward:,.0f}" for cost in costs))
    times = {f"device time ({kind})": [cost.device_s for cost in costs], "wall time": [cost.wall_s for cost in costs]}
    for name, seconds in times.items():
        table.add_row(f"{name}, h:min:s", *(str(timedelta(seconds=round(each))) for each in seconds))
    table.add_row("disk", "", decimal(sum(found.disk.values())))
    return table


def _grounds(job: Job, times: StageTimes, found: Estimate, slots: int) -> Iterator[tuple[str, str]]:
    """What the estimate stands on: what was measured, what is assumed, what is left out."""
    pruner, cores = job.search.pruner, os.cpu_count() or 1
    stopped = "none is stopped" + (", as no claim is made for the median rule" if pruner.kind == "median" else "")
    if pruner.kind == "halving":
        stopped = f"1 in {pruner.factor} goes on at each rung of the halving"
    timed = f"passes and steps in batches of {times.batch}, reading at {decimal(int(times.read_bytes_per_s))}/s"
    yield "measured", f"{timed}, resources.threads = {times.threads}, on {times.hardware}"
    held = f"{slots}, as many as this machine holds" if slots else "1 (this machine has less than resources asks for)"
    yield "assumed", f"trials at once: {held}; none is slowed by the others"
    if times.device == "cpu" and slots * times.threads > cores:
        yield "", f"(they will be: {slots} x {times.threads} threads on {cores} cores; raise resources.cpus)"
    yield "expected", f"trials spread evenly over each arm's space; {stopped}"
    yield "at most", "each trial takes its arm's dearest freeze depth and most epochs; none is stopped"
    for key in ("steps", "device_s"):
        if limit := getattr(job.search, key):
            yield "limited", f"arms end at an equal share of search.{key} = {limit:,}; not taken off above"
    yield "disk", ", ".join(f"{name} {decimal(size)}" for name, size in found.disk.items() if name != "inputs")
    yield "", f"in {job.folder}, features in {job.features.path}"
    yield "", f"inputs {decimal(found.disk['inputs'])} in {cache_root()}, there already"
    yield (
        "left out",
        "starting Ray and its workers, what Ray and the sampler take, and what trials save that train together",
    )


def _facts(lines: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(Column(overflow="fold"), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for name, text in lines:
        table.add_row(plain(name), plain(text))
    return table
