"""What follows from the times that the parts of a backbone take: which activations are worth storing, and what a trial takes by
itself. Pure functions; `measure` takes the times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

TIMING_S = 10.0  # what the timed passes and steps may take on a CPU
WORTH = 1.3  # activations are stored where the trials at their cut become this many times faster

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class StageTimes:
    """Seconds per image, on the device and with the threads of a trial."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    device: str
    """`cpu`, `cuda` or `mps`."""
    hardware: str
    threads: int
    batch: int
    """Images in a timed batch: the job's, or fewer below the head where those would take too long or too much memory."""
    prefix_s: Mapping[int, Seconds]
    """Cut -> forward through the stages before it, in eval mode; 0.0 at 0. It has every cut that the arms may draw, and the
    last one, which has the whole backbone before it."""
    step_s: Mapping[int, Seconds]
    """Cut -> a training step, forward, backward and optimizer, of what comes after it, in batches of the job's size."""
    view_s: Seconds
    """To vary a train image as `augment` says; 0.0 where it says nothing."""
    read_bytes_per_s: Annotated[float, Field(gt=0)]
    """At which activations are read back."""
    start_s: Seconds
    """Of a trial, before its first step: to build, freeze and audit the network."""

    @property
    def forward_s(self) -> float:
        """The whole backbone in eval mode."""
        return self.prefix_s[max(self.prefix_s)]


TIMES = TypeAdapter(StageTimes)


def times_of(found: Mapping[str, Any]) -> StageTimes:
    """The times from their JSON form. Raises pydantic's ValidationError."""
    return TIMES.validate_python(found)


# --- deciding ---


@dataclass(frozen=True)
class Choice:
    """Whether the activations at a cut are stored."""

    cut: int
    stored: bool
    gain: float | None
    """How many times faster the trials at this cut are for it; None where the backbone cannot be resumed."""
    image_bytes: int | None
    """Of one image's activation, as it is stored."""
    reason: str


def choose_cuts(
    times: StageTimes,
    image_bytes: Mapping[int, int],
    reads: Mapping[int, float],
    *,
    images: int,
    lanes: int,
    live_views: bool,
    cache: str,
    budget_bytes: float,
) -> list[Choice]:
    """For each cut that the arms may draw (those of `reads`): is it stored?

    `image_bytes` has the cuts that the backbone can be resumed from, `reads` how often an activation would be read in the
    whole search. Storing turns so many steps of `prefix + step` seconds into one pass, a write, and so many steps of
    `read + step`; under live views, where val alone is stored, into steps of `prefix / lanes + step`, as trials share the
    pass. It pays where that is `WORTH` times faster. Where the `images` to store at all such cuts do not fit the budget,
    those that save the most seconds per byte are kept.
    """
    choices: dict[int, Choice] = {}
    saved: dict[int, float] = {}  # seconds per image and epoch
    for cut in sorted(set(reads) - {0}):
        if cut not in image_bytes:
            choices[cut] = Choice(cut, False, None, None, "the backbone cannot be resumed here")
            continue
        passed, step, size = times.view_s + times.prefix_s[cut], times.step_s[cut], image_bytes[cut]
        fed = passed / lanes if live_views else size / times.read_bytes_per_s
        once = 0.0 if live_views else (passed + fed) / reads[cut]
        gain, saved[cut] = (passed + step) / (once + fed + step), passed - once - fed
        pays = cache == "all" or (cache == "auto" and gain >= WORTH)
        if cache != "auto":
            reason = f'features.cache = "{cache}"'
        elif pays:
            reason = f"a live pass serves {lanes} trials" if live_views else "reading is faster than computing"
        elif fed > passed:
            reason = "reading is slower than computing"
        elif (passed + step) / (fed + step) >= WORTH:
            reason = f"it would be read too seldom, {reads[cut]:.2g} times"
        else:
            reason = f"it would gain less than {WORTH:g} times"
        choices[cut] = Choice(cut, pays, gain, size, reason)
    room = budget_bytes
    for cut in sorted(saved, key=lambda cut: -saved[cut] / image_bytes[cut]):
        size = image_bytes[cut] * images
        if choices[cut].stored and size > room:
            reason = f"it takes {size / 1e9:.3g} GB, and features.budget_gb leaves {room / 1e9:.3g}"
            choices[cut] = replace(choices[cut], stored=False, reason=reason)
        elif choices[cut].stored:
            room -= size
    return [*choices.values()]


def trial_seconds(
    times: StageTimes,
    cut: int,
    trained: Mapping[int, float],
    scored: float,
    early: float = 0.0,
    *,
    end: int | None = None,
    read_bytes: int | None = None,
    live_views: bool = False,
) -> float:
    """Seconds of one trial that shares nothing, whose first `cut` stages are frozen throughout: its start; images through
    steps, by the first stage that trains in them (`trained`); `early` train images forward before those, and `scored` images of
    val and test forward. Its head stands after `end` stages (all, when not given).

    With `read_bytes` an image, activations at the cut are read; under live views those of val and test alone.
    """
    passed = times.prefix_s[cut]
    read = passed if read_bytes is None else read_bytes / times.read_bytes_per_s
    shown = times.view_s + passed if live_views or read_bytes is None else read
    last = max(times.prefix_s)
    end = last if end is None else end
    rest = max(0.0, times.prefix_s[end] - passed)
    left_out = times.step_s[end] - times.step_s[last]  # steps of a head are in both
    steps = sum(
        images * (shown + max(0.0, times.prefix_s[first] - passed) + max(0.0, times.step_s[first] - left_out))
        for first, images in trained.items()
    )
    return times.start_s + steps + early * (shown + rest) + scored * (read + rest)


def alone_seconds(
    times: StageTimes,
    epochs: Mapping[int, int],
    n_train: int,
    n_val: int,
    n_test: int,
    early: int = 0,
    end: int | None = None,
) -> float:
    """What a trial would have taken by itself, with nothing stored and nothing shared: every epoch passes the train samples
    live through a step, and the val samples forward (`epochs`: by the first stage that trained in them); a confirmation passes
    test once; `early` passes over the train samples come before (to recalibrate norm layers, or for a closed-form head)."""
    trained = {first: count * n_train for first, count in epochs.items()}
    scored = sum(epochs.values()) * n_val + n_test
    return trial_seconds(times, min(epochs, default=0), trained, scored, early * n_train, end=end)
