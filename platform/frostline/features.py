"""What a trial is fed: inputs (normalised images, ids of tokens), or activations at its cut, read from the store or made by a pass that the
trials of a pack share.

Activations are exact: the frozen prefix is deterministic, and the key under which they are stored covers everything that
could change them, the view of an image included. So a trial gets the numbers that it would have computed itself.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frostline.backbone import Backbone
from frostline.closedform import pooled_width
from frostline.cuts import Cut, cut_at, cuts_at, emit, widened
from frostline.data import Dataset
from frostline.shown import Shown
from frostline.spec import Augment, Features
from frostline.store import Store, key_of
from frostline.versions import VERSIONED, versions
from frostline.views import augmented, view_of, views_key
from frostline.world import mixed

EVAL_BATCH = 64

Fetch = Callable[[np.ndarray, int], Tensor]
"""Sample numbers (B,) and the epoch, counted from 1, to what the network is fed, on the device: inputs, (B, 3, H, W) or
(B, 2, T), or (B, …) activations at the cut. Epoch 0 asks for the inputs as they are, as validation and test do."""


@dataclass(frozen=True)
class Origin:
    """What activations are made from, the samples, the cut and the view apart."""

    backbone: Backbone
    dataset: Dataset
    device: torch.device
    autocast: torch.dtype | None
    dtype: str
    """Of what is stored: `float32` or `float16`."""
    augment: Augment
    augment_seed: int

    def cuts(self, indices: Collection[int]) -> dict[int, Cut]:
        """The cuts of these indices, ascending, from which the backbone can be resumed; see `cuts_at`."""
        found = cuts_at(self.backbone, self.dataset.size, indices)
        assert found.keys() == set(indices), f"{self.backbone.name} cannot be resumed from all of {sorted(indices)}"
        return found

    def cut(self, index: int) -> Cut:
        """One of `cuts`."""
        return self.cuts((index,))[index]

    def rounding(self, index: int) -> Cut | None:
        """The cut at which a live pass rounds its activations, as storing them would; None where that changes nothing."""
        return rounded_at(self.backbone, self.dataset.size, index, self.dtype, self.autocast)

    def about(self, cut: int, view: int | None, *, mean: bool = False) -> dict[str, Any]:
        """Everything that could change an activation, or its `mean` over positions (P12), as JSON values."""
        backbone = self.backbone
        pool = {"pool": backbone.inputs.pool} if mean and len(self.cut(cut).shape) > 1 else {}
        return {
            **pool,
            "backbone": backbone.name,
            "source": backbone.source_hash,
            "weights": backbone.weights_hash,
            "stages": backbone.stages_hash,
            **backbone.inputs.about(),
            "cut": cut,
            "boundary": self.cut(cut).module,
            "inputs": self.dataset.inputs_hash,
            "view": None if view is None else views_key(self.augment, self.augment_seed, view),
            "dtype": self.dtype,
            "autocast": str(self.autocast) if self.autocast else None,
            "device": self.device.type,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "batch": EVAL_BATCH,
            "versions": {name: versions()[name] for name in VERSIONED if name in versions()},
        }

    def width(self, end: int) -> int:
        """Features of a head on the first `end` stages."""
        last = end == len(self.backbone.stages)
        return self.backbone.feature_dim if last else pooled_width(self.cut(end).shape)

    def rounded_mean(self, activations: Tensor) -> Tensor:
        """(N, D) means over positions of (N, …) activations, or what else the backbone pools, as they come back from the store."""
        return widened(self.backbone.inputs.pooled(activations).to(getattr(torch, self.dtype)))

    def inputs(self, samples: np.ndarray, view: int | None) -> Tensor:
        """What the backbone takes: (B, 3, H, W) normalised images, or (B, 2, T) ids and types of tokens."""
        rows = self.dataset.inputs[samples]
        if view is not None:
            rows = augmented(rows, samples, view, self.augment, self.augment_seed)
        return self.backbone.inputs.fed(rows, self.device)

    def expect(self, samples: np.ndarray) -> None:
        """These samples' inputs will be asked for next, in this order: where they are made anew, that may begin."""
        if isinstance(self.dataset.inputs, Shown):
            self.dataset.inputs.expect(samples)

    def view(self, epoch: int) -> int | None:
        """The view that an epoch shows; none in epoch 0."""
        return view_of(epoch, self.augment) if epoch else None


@dataclass
class Feed:
    """What a process feeds its trials, and keeps between them."""

    resident_bytes: int = 4 << 30
    """Activations up to this size are held in a GPU's memory; on a CPU they are read from the mapped files."""
    images_forwarded: int = 0
    """Images, or texts, that passed through a frozen prefix here, one by one counted."""
    pass_s: float = 0.0
    """Seconds that these passes took."""
    _modules: dict[tuple[Backbone, torch.device], nn.Module] = field(default_factory=dict)
    _resident: OrderedDict[tuple[str, bytes], Tensor] = field(default_factory=OrderedDict)
    _passed_cuts: frozenset[int] = frozenset()
    """Cuts whose activations are made by a live pass, for all the trials that will ask for the same batch."""
    _passed: tuple[Any, dict[int, Tensor]] = (None, {})

    def module(self, origin: Origin) -> nn.Module:
        """The pristine backbone on its device, in eval mode; not to be trained."""
        place = (origin.backbone, origin.device)
        if place not in self._modules:
            self._modules[place] = on_device(origin.backbone, origin.device)
        return self._modules[place]

    def inputs(self, origin: Origin) -> Fetch:
        """Fetch what the backbone takes."""
        return lambda samples, epoch: origin.inputs(samples, origin.view(epoch))

    def activations(
        self, origin: Origin, cut: int, samples: np.ndarray, features: Features, *, mean: bool = False
    ) -> Fetch:
        """Fetch activations at `cut` of these samples, or their `mean` over positions, from the store where the view is one
        that is stored.

        Raises FeatureError where the store lacks some of them.
        """
        assert features.path is not None, "made absolute by `prepare`"
        store = Store(features.path)
        readers: dict[int | None, Callable[[np.ndarray], Tensor]] = {}
        if origin.augment.views == "live":
            self._passed_cuts |= {cut}

        def fetch(wanted: np.ndarray, epoch: int) -> Tensor:
            view = origin.view(epoch)
            if view is not None and origin.augment.views == "live":
                passed = self.pass_through(origin, self._passed_cuts, wanted, view)[cut]
                return origin.rounded_mean(passed) if mean else passed.clone()
            if view not in readers:
                key = key_of(origin.about(cut, view, mean=mean))
                readers[view] = self._reader(store, key, samples, origin.device)
            return readers[view](wanted)

        return fetch

    def _reader(
        self, store: Store, key: str, samples: np.ndarray, device: torch.device
    ) -> Callable[[np.ndarray], Tensor]:
        rows = store.open(key)
        row_bytes = rows.nbytes // max(1, len(rows.samples))
        if device.type == "cpu" or row_bytes * len(samples) > self.resident_bytes:
            return lambda wanted: from_rows(torch.from_numpy(rows.gather(wanted)).to(device))
        held = (key, samples.tobytes())
        if held not in self._resident:
            self._resident[held] = torch.from_numpy(rows.gather(samples)).to(device)
            while sum(table.nbytes for table in self._resident.values()) > self.resident_bytes:
                self._resident.popitem(last=False)
        table = self._resident[held]
        self._resident.move_to_end(held)
        return lambda wanted: from_rows(table[torch.from_numpy(np.searchsorted(samples, wanted)).to(device)])

    def pretrained(self, origin: Origin, end: int, samples: np.ndarray, features: Features | None) -> Tensor:
        """(n, D) features that the first `end` pretrained stages give of train samples, as the first epoch shows them: from
        the store, or (None) by a live pass."""
        if features is not None:
            return self.means(origin, end, origin.view(1), samples, features)
        passed = (self.full_pass(origin, {end}, part, origin.view(1))[end] for part in chunks(samples, EVAL_BATCH))
        made = torch.cat([origin.rounded_mean(activations).cpu() for activations in passed])
        self._passed = (None, {})
        return made

    def means(self, origin: Origin, cut: int, view: int | None, samples: np.ndarray, features: Features) -> Tensor:
        """(n, D) activations at a cut, their mean over positions where they have any, from the store, on the CPU."""
        assert features.path is not None, "made absolute by `prepare`"
        rows = Store(features.path).open(key_of(origin.about(cut, view, mean=True)))
        return widened(torch.from_numpy(rows.gather(samples)))

    def full_pass(
        self, origin: Origin, cuts: Collection[int], samples: np.ndarray, view: int | None
    ) -> dict[int, Tensor]:
        """`pass_through` of at most EVAL_BATCH samples, in a full batch; see `filled`."""
        whole = samples if len(samples) >= EVAL_BATCH else np.resize(samples, EVAL_BATCH)
        passed = self.pass_through(origin, cuts, whole, view)
        self.images_forwarded -= len(whole) - len(samples)
        return {cut: made[: len(samples)] for cut, made in passed.items()}

    def pass_through(
        self, origin: Origin, cuts: Collection[int], samples: np.ndarray, view: int | None
    ) -> dict[int, Tensor]:
        """Activations of these samples at `cuts`, by one pass; the same one when the last question is asked again."""
        question = (origin, frozenset(cuts), samples.tobytes(), view)
        if self._passed[0] != question:
            started = time.perf_counter()
            with mixed(origin.device, origin.autocast):
                passed = emit(self.module(origin), origin.cuts(cuts).values(), origin.inputs(samples, view))
            dtype = getattr(torch, origin.dtype)
            self._passed = question, {cut: widened(made.to(dtype)) for cut, made in passed.items()}
            self.images_forwarded += len(samples)
            self.pass_s += time.perf_counter() - started
        return self._passed[1]

    def forget_passes(self) -> None:
        """What trials asked of live passes is over with them."""
        self._passed_cuts, self._passed = frozenset(), (None, {})


def rounded_at(backbone: Backbone, image_size: int, index: int, dtype: str, autocast: torch.dtype | None) -> Cut | None:
    """The cut at which a live pass rounds its activations to `dtype`, as storing them would; None where that changes nothing."""
    exact = autocast is None and getattr(torch, dtype) == torch.get_default_dtype()
    return None if index == 0 or exact else cut_at(backbone, image_size, index)


def on_device(backbone: Backbone, device: torch.device) -> nn.Module:
    """A copy of the backbone, channels last in memory."""
    return copy.deepcopy(backbone.module).to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def to_rows(activations: Tensor, dtype: str) -> np.ndarray:
    """(B, …) activations as rows to store, in `dtype`; (B, C, H, W) as (B, H, W, C), which is how they lie in memory."""
    if activations.ndim == 4:
        activations = activations.permute(0, 2, 3, 1)
    return activations.to(getattr(torch, dtype)).cpu().contiguous().numpy()


def from_rows(rows: Tensor) -> Tensor:
    """What `to_rows` was given, in float32 at least."""
    return widened(rows.permute(0, 3, 1, 2) if rows.ndim == 4 else rows)


def filled(batch: Tensor) -> Tensor:
    """(EVAL_BATCH, …) where a batch has fewer rows: the same again and again. Passes of fewer take other code paths, whose last bits
    differ; with all batches full, what a sample gives does not depend on which others it is passed with."""
    return batch if len(batch) >= EVAL_BATCH else torch.cat([batch] * -(-EVAL_BATCH // len(batch)))[:EVAL_BATCH]


def chunks(samples: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive pieces of at most `size` samples."""
    return (samples[start : start + size] for start in range(0, len(samples), size))
