"""Two workers on two cores against one on one, and Frostline's loop against a plain PyTorch script under DDP.

All train the last two stages of timm/resnet18 (random weights) on 190 digits at 224 px, 179 for val, in batches of 64, on live
images (computing bound: the 42 MB of gradients a step are little beside it), under AdamW, one thread a worker; `frostline train` on a local Ray, the script as two processes that gloo joins. Both
score val after every epoch. What is compared is an epoch's time, as the first worker sees it, the mean without the first: starting is left out, and
said as `start_s`. The ratio is one worker's epoch over two workers', both on Ray; `loop` is the script's epoch over that of Frostline's
loop in two such processes, without Ray, `script` that over Frostline's two workers on Ray, whose own dozen processes take some hundredths
of two cores. All hold what is frozen in eval mode; ours also audits, reports and keeps a checkpoint at most once a minute.

    python benchmarks/workers.py [--rounds 3] [--quick]
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import frostline
from _measure import interleaved, ratios, say
from frostline import results
from frostline.backbone import load_backbone
from frostline.data import load_data
from frostline.features import Feed
from frostline.jobfile import parse_job
from frostline.outcome import EpochRecord
from frostline.prepare import prepare
from frostline.seeds import derive_seed
from frostline.spec import Job
from frostline.trial import run_trial
from frostline.trialspec import Config, confirm_seeds, trial_of
from frostline.world import World

BATCH, DEPTH, EVAL = 64, 3, 32


def job_of(root: Path, workers: int, *, quick: bool) -> Job:
    """The training."""
    return parse_job(
        {
            "name": "workers",
            "results": str(root / "study"),
            "data": {
                "path": "digits",
                "image_size": 32 if quick else 224,
                "per_class": 16 if quick else 19,
                "val": 0.1,
            },
            "backbone": {"name": "timm/resnet18", "weights": "random"},
            "freeze": {"strategy": "freeze_depth", "depth": DEPTH},
            "train": {"epochs": 2 if quick else 3, "batch_size": BATCH, "warmup": 0.0},
            "features": {"cache": "none"},
            "scaling": {"workers": workers},
        }
    )


def ours(job: Job) -> tuple[float, float]:
    """Seconds of an epoch, and of all that is not epochs."""
    started = time.perf_counter()
    study = frostline.train(job, console=Console(file=io.StringIO()))
    wall_s = time.perf_counter() - started
    epochs = results.read_epochs(study).sort_by("epoch")["seconds"].to_pylist()
    return statistics.fmean(epochs[1:]), wall_s - sum(epochs)


def joined(work: Callable[[int, Job], list[float]], job: Job) -> float:
    """Seconds of an epoch of this work on two processes that gloo joins; it answers those of all epochs, given a rank."""
    with tempfile.TemporaryDirectory() as folder:
        context, pipes = multiprocessing.get_context("spawn"), []
        for rank in range(2):
            mine, other = context.Pipe()
            context.Process(target=_join, args=(other, folder, rank, work, job)).start()
            pipes.append(mine)
        first, _ = [pipe.recv() for pipe in pipes]
        return statistics.fmean(first[1:])


def _join(answer: Connection, folder: str, rank: int, work: Callable[[int, Job], list[float]], job: Job) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    answer.send(work(rank, job))
    dist.destroy_process_group()


def loop(rank: int, job: Job) -> list[float]:
    """Frostline's own."""
    job, (seed, seeds) = prepare(job).job, confirm_seeds(job, 0)
    config = Config(freeze=job.freeze, head=job.head, train=job.train)
    who = {"trial_id": "loop", "arm": "loop", "number": 0, "round": "search", "seed": seed}
    seconds: list[float] = []

    def report(record: EpochRecord) -> bool:
        seconds.append(record.seconds)
        return True

    world = World.here(job.resources, rank=rank, workers=2)
    run_trial(trial_of(job, config, seeds, **who), feed=Feed(), world=world, report=report)
    return seconds


def script(rank: int, job: Job) -> list[float]:
    """The plain one."""
    backbone = load_backbone(job.backbone, image_size=job.data.image_size)
    dataset = load_data(job.data, derive_seed(job.seed, "split"))
    trunk = backbone.module
    for name, module in trunk.named_modules():
        live = name.startswith(("layer3", "layer4"))
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(live and not isinstance(module, torch.nn.BatchNorm2d))
    network = torch.nn.Sequential(trunk, torch.nn.Linear(backbone.feature_dim, len(dataset.classes)))
    network = network.to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the setting has a new name, which older versions lack
        model = DistributedDataParallel(network, broadcast_buffers=False)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-4, fused=True)
    mean, std = (255 * torch.tensor(each).view(1, 3, 1, 1) for each in (backbone.inputs.mean, backbone.inputs.std))
    labels = torch.from_numpy(dataset.labels)

    def images(samples: torch.Tensor) -> torch.Tensor:
        pixels = torch.from_numpy(dataset.inputs[samples.numpy()]).permute(0, 3, 1, 2).float()
        return pixels.sub_(mean).div_(std)

    train = torch.from_numpy(dataset.indices("train"))[: len(dataset.classes) * (job.data.per_class or 0)]
    val = torch.from_numpy(dataset.indices("val"))
    seconds = []
    for epoch in range(job.train.epochs):
        started = time.perf_counter()
        order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))]
        network.eval()  # all norm layers are frozen
        for batch in order.split(BATCH):
            own = batch.chunk(2)[rank]
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(images(own)), labels[own]).backward()
            optimizer.step()
        with torch.no_grad():
            logits = torch.cat([network(images(part)) for part in val.split(EVAL)[rank::2]])
        gathered: list[torch.Tensor | None] = [None, None]
        dist.all_gather_object(gathered, logits)
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few small images, one round")
    arguments = parser.parse_args()
    quick, rounds = arguments.quick, 1 if arguments.quick else arguments.rounds
    starts: dict[int, list[float]] = {1: [], 2: []}

    def trained(workers: int) -> float:
        with tempfile.TemporaryDirectory() as root:
            epoch_s, start_s = ours(job_of(Path(root), workers, quick=quick))
        starts[workers].append(start_s)
        return epoch_s

    seconds = interleaved(
        {
            "one": lambda: trained(1),
            "two": lambda: trained(2),
            "loop": lambda: joined(loop, job_of(Path(), 2, quick=quick)),
            "script": lambda: joined(script, job_of(Path(), 2, quick=quick)),
        },
        rounds,
    )
    say(
        "workers",
        {
            **ratios(seconds["two"], seconds["one"]),
            "rounds": rounds,
            "counts": {"epochs": job_of(Path(), 2, quick=quick).train.epochs},
            "loop": ratios(seconds["loop"], seconds["script"]),
            "script": ratios(seconds["two"], seconds["script"]),
            "epoch_s": {name: statistics.median(each) for name, each in seconds.items()},
            "start_s": {str(workers): statistics.median(each) for workers, each in starts.items()},
        },
    )


if __name__ == "__main__":
    main()
