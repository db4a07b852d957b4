"""A study as TensorBoard's event files, one a trial: scalars by epoch, and what its HPARAMS tab shows."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from frostline.extras import extra
from frostline.runs import FINAL, Run, Tracked, lacking

STATUSES = {
    "complete": "STATUS_SUCCESS",
    "pruned": "STATUS_SUCCESS",  # there is none for a run that was stopped because others were better
    "failed": "STATUS_FAILURE",
}
_FACTS = ("arm", "round", "status", "finalist_of")
_PARTS = {
    "event": "tensorboard.compat.proto.event_pb2",
    "summary": "tensorboard.compat.proto.summary_pb2",
    "hparams": "tensorboard.plugins.hparams.plugin_data_pb2",
    "status": "tensorboard.plugins.hparams.api_pb2",
    "records": "tensorboard.summary.writer.record_writer",
}
"""Of the package tensorboard, whose parts need no torch: torch.utils.tensorboard and tensorboardX import it."""


def export(study: Tracked, out: Path) -> str:
    """Write OUT/STUDY/TRIAL/events.out.tfevents.… for each trial that has ended and has none there; what was written.

    A file appears when it is whole, and is never touched again. Raises MissingExtraError, ExportError, as `runs.lacking`, and
    OSError.
    """
    parts = SimpleNamespace(**{name: extra("tensorboard", module) for name, module in _PARTS.items()})
    folder = out / study.name
    there = {path.parent.name: path.name.rpartition(".")[2] for path in folder.glob("*/events.out.tfevents.*")}
    runs = lacking(study, there, folder)
    for run in runs:
        _write(folder, run, parts)
    return f"{len(runs):,} trials more, {len(study.ended):,} in all"


def _write(folder: Path, run: Run, parts: Any) -> None:
    final = folder / run.trial_id / f"events.out.tfevents.{int(run.started.timestamp())}.frostline.{run.key}"
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".partial-{uuid.uuid4().hex}")  # TensorBoard reads what has `tfevents` in its name
    try:
        with partial.open("wb") as file:
            writer = parts.records.RecordWriter(file)
            for event in _events(run, parts):
                writer.write(event.SerializeToString())
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def _events(run: Run, parts: Any) -> Iterator[Any]:
    """What the event file of a trial that has ended says, in the order of time."""
    assert run.finished
    event, hparams = parts.event.Event, parts.hparams
    began, ended = run.started.timestamp(), run.finished.timestamp()
    start = hparams.SessionStartInfo(group_name=run.trial_id, start_time_secs=began)
    for key, value in ({key: run.facts[key] for key in _FACTS if key in run.facts} | run.config).items():
        _set(start.hparams[key], value)
    end = hparams.SessionEndInfo(status=parts.status.Status.Value(STATUSES[run.status]), end_time_secs=ended)
    yield event(wall_time=began, file_version="brain.Event:2")
    yield event(wall_time=began, summary=_session("start", hparams.HParamsPluginData(session_start_info=start), parts))
    for epoch in run.epochs:
        yield event(wall_time=epoch.at_s, step=epoch.epoch, summary=_scalars(epoch.metrics, parts))
    finals = {f"{FINAL}{name}": value for name, value in run.finals.items()}
    yield event(wall_time=ended, step=len(run.epochs), summary=_scalars(finals, parts))
    yield event(wall_time=ended, summary=_session("end", hparams.HParamsPluginData(session_end_info=end), parts))


def _scalars(values: Mapping[str, float], parts: Any) -> Any:
    value = parts.summary.Summary.Value
    return parts.summary.Summary(value=[value(tag=tag, simple_value=number) for tag, number in values.items()])


def _session(which: str, data: Any, parts: Any) -> Any:
    plugin = parts.summary.SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
    metadata = parts.summary.SummaryMetadata(plugin_data=plugin)
    value = parts.summary.Summary.Value(tag=f"_hparams_/session_{which}_info", metadata=metadata)
    return parts.summary.Summary(value=[value])


def _set(field: Any, value: Any) -> None:
    """A JSON value into a protobuf Value."""
    if isinstance(value, bool):
        field.bool_value = value
    elif isinstance(value, int | float):
        field.number_value = value
    else:
        field.string_value = str(value)
