"""Parts of a prediction on a pool of actors, by Ray Data: tasks read and decode, actors hold the bundle, rows come back here.

A part is one row of the dataset, so that it is never divided: its inputs go from the task to an actor, and its tables to this
process, which alone commits. What dies with a worker or a node is done again by Ray; what dies with this process, by the next run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from frostline.connection import cluster

import ray  # isort: skip (as `tune` has set it up)
import ray.data  # isort: skip
from ray.exceptions import RayError  # isort: skip

from frostline.bundle import Bundle, bundle_of, files_of
from frostline.parts import Part, Work, batch_of, decoded, predict_part
from frostline.pixels import Recipe
from frostline.samples import BadSample
from frostline.worker import bring_from
from frostline.world import gpus_of_a_trial


class PoolError(RuntimeError):
    """Actors or tasks that Ray could not keep alive."""


class PartPredictor:
    """An actor: the bundle, loaded once, and parts that pass through it."""

    def __init__(
        self, files: list[Any], have: Callable[[], None], batch: int | None, features: bool, recipe: Recipe
    ) -> None:
        """`files` is a list of one reference to the bundle's files, name -> content; `have` has here what else it is loaded from."""
        have()
        self.bundle = bundle_of(ray.get(files[0]))
        self.batch = batch or batch_of(self.bundle, recipe)
        self.features, self.shape, self.dtype = features, recipe.shape, recipe.dtype

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A part's inputs to its tables."""
        about = json.loads(row["about"])
        made = iter(np.frombuffer(row["inputs"], self.dtype).reshape(-1, *self.shape))
        bad = {int(position): reason for position, reason in about["bad"].items()}
        inputs = (BadSample(bad[position]) if position in bad else next(made) for position in range(len(about["ids"])))
        part = predict_part(self.bundle, about["ids"], about["names"], inputs, batch=self.batch, features=self.features)
        return {
            "part": row["part"],
            "predictions": _to_bytes(part.predictions),
            "unreadable": _to_bytes(part.unreadable),
        }


def predict_on_ray(
    folder: Path,
    bundle: Bundle,
    work: Work,
    todo: list[int],
    keep: Callable[[int, Part], None],
    *,
    address: str | None,
    allow_open: bool = False,
) -> None:
    """Predict these parts on the cluster at `address`, or on a local one that is started and stopped here, and keep each. A pass
    takes the threads, or the GPU, that its trial had.

    The `bundle` in `folder` travels, and what it is loaded from; the data must be found under the same name on every node.
    """
    files, resources = files_of(folder), bundle.spec.resources
    with cluster(address, allow_open=allow_open) as wait:
        wait()
        there = ray.cluster_resources()
        gpus = gpus_of_a_trial(resources, there.get("GPU", 0))
        places = int(there["GPU"] / gpus if gpus else there["CPU"] / resources.threads)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        have = partial(bring_from, ray.get_runtime_context().get_node_id(), bundle.parcels)
        held, sent = ray.put(work), ray.put(files)  # in lists they stay references: processes get them once each
        rows = (
            ray.data.from_items([{"part": number} for number in todo], override_num_blocks=len(todo))
            .map(_read_part, fn_args=([held],), num_cpus=1)  # pyright: ignore[reportArgumentType]
            .map(
                PartPredictor,  # pyright: ignore[reportArgumentType] (as the documentation has it)
                fn_constructor_args=([sent], have, work.batch, work.features, work.recipe),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(places, len(todo)))),
                num_cpus=resources.threads,
                num_gpus=gpus,
            )
        )
        try:
            for row in rows.iter_rows():
                keep(int(row["part"]), Part(_from_bytes(row["predictions"]), _from_bytes(row["unreadable"])))
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ValueError):
                raise cause from None
            raise PoolError(
                f"Ray Data could not go on: {str(error).strip().splitlines()[-1]}. What is committed stays; the same command goes "
                "on from there"
            ) from error


def _read_part(row: dict[str, Any], held: list[Any]) -> dict[str, Any]:
    """A part's number to its inputs, ids and classes, and what could not be read."""
    work, number = _work(held[0]), int(row["part"])
    bad: dict[int, str] = {}
    inputs: list[bytes] = []
    for position, made in enumerate(decoded(work.source, work.parts[number], work.recipe)):
        if isinstance(made, BadSample):
            bad[position] = str(made)
        else:
            inputs.append(made.tobytes())
    about = {"ids": work.ids(number), "names": work.names(number), "bad": bad}
    return {"part": number, "inputs": b"".join(inputs), "about": json.dumps(about)}


@lru_cache(maxsize=2)
def _work(held: Any) -> Work:
    return ray.get(held)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_bytes(raw: bytes) -> pa.Table:
    return pa.ipc.open_stream(raw).read_all()
