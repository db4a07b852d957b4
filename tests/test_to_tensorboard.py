"""Event files, as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.api_pb2 import ColParams, ListSessionGroupsRequest, MetricName, Status
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from _tracked import BEGAN, finish_running, write_tried
from frostline.results import read_trials
from frostline.runs import ExportError
from frostline.track import track


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, tag: str) -> list[tuple[float, int, float]]:
    """Time, step and value of each."""
    return [(event.wall_time, event.step, event.value) for event in read(folder).Scalars(tag)]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def session_groups(logdir: Path) -> list[Any]:
    """The rows of the HPARAMS tab."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, "here")))
    column = ColParams(metric=MetricName(tag="final/val_score"))
    request = ListSessionGroupsRequest(slice_size=100, col_params=[column], allowed_statuses=Status.values())
    return list(Handler(RequestContext(), context, "here", request).run().session_groups)


def test_a_trial_is_a_run_with_its_epochs(study_folder: Path) -> None:
    done = track(write_tried(study_folder), "tensorboard")
    best = done.path / "tried" / "freeze-00004"
    began = BEGAN.timestamp() + 64
    assert scalars(best, "val_score") == [
        pytest.approx(each) for each in ((began + 5, 1, 0.2), (began + 7.5, 2, 0.4), (began + 10, 3, 0.6))
    ]
    assert [value for _, _, value in scalars(best, "lr")] == pytest.approx([1e-3] * 3)
    assert {"train_loss", "val_loss", "val_score", "lr", "head_lr"} <= set(read(best).Tags()["scalars"])
    assert scalars(best, "final/val_score")[0][1:] == (3, pytest.approx(0.6))
    assert "final/val_score" not in read(done.path / "tried" / "freeze-00002").Tags()["scalars"]  # pruned
    assert {path.name for path in (done.path / "tried").iterdir()} == set(
        read_trials(study_folder)["trial_id"].to_pylist()
    )


def test_the_hparams_tab_has_every_trial(study_folder: Path) -> None:
    rows = {group.name: group for group in session_groups(track(write_tried(study_folder), "tensorboard").path)}
    assert rows.keys() == set(read_trials(study_folder)["trial_id"].to_pylist())
    best = rows["freeze-00004"]
    assert best.hparams["train.lr"].number_value == pytest.approx(1e-5 * 2**4)
    assert best.hparams["arm"].string_value == "freeze"
    found = {value.name.tag: value.value for value in best.metric_values}
    assert found["final/val_score"] == pytest.approx(0.6)


def test_again_writes_nothing_and_later_what_has_ended_since(study_folder: Path) -> None:
    done = track(write_tried(study_folder), "tensorboard")
    assert done.wrote == "11 trials more, 11 in all"
    first = files(done.path)
    assert track(study_folder, "tensorboard").wrote == "0 trials more, 11 in all"
    assert files(done.path) == first
    finish_running(study_folder)
    assert track(study_folder, "tensorboard").wrote == "1 trials more, 12 in all"
    later = files(done.path)
    assert {path.parent.name for path in later.keys() - first.keys()} == {"freeze-00008"}
    assert first.items() <= later.items()


def test_an_export_that_was_interrupted_is_completed(study_folder: Path) -> None:
    done = track(write_tried(study_folder), "tensorboard")
    whole = files(done.path)
    lost = next(path for path in whole if path.parent.name == "freeze-00004")
    lost.rename(lost.with_name(".partial-0"))
    assert track(study_folder, "tensorboard").wrote == "1 trials more, 11 in all"
    assert files(done.path) == whole | {lost.with_name(".partial-0"): whole[lost]}


def test_studies_may_share_a_folder_but_not_a_name(study_folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    track(write_tried(study_folder), "tensorboard", shared)
    track(write_tried(tmp_path / "other", name="other"), "tensorboard", shared)
    assert sorted(path.name for path in shared.iterdir()) == ["other", "tried"]
    (shared / "tried").rename(shared / "kept")
    (shared / "other").rename(shared / "tried")
    before = files(shared)
    with pytest.raises(ExportError, match="freeze-00000 of another study called 'tried'"):
        track(study_folder, "tensorboard", shared)
    assert files(shared) == before
