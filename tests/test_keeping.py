"""Where checkpoints lie: written whole, read back, and gone when their trial has ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import frostline
from _s3 import s3_endpoint
from frostline import results
from frostline.files import locate
from frostline.keeping import drop_checkpoint, kept_trials, read_checkpoint, write_checkpoint
from frostline.study import Study
from frostline.testing import toy_job


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    """A bucket of a real S3 endpoint."""
    with s3_endpoint() as (place, client):
        client.create_bucket(Bucket="kept")
        yield f"s3://kept/deep?endpoint_override={place}&scheme=http&region=us-east-1"


@pytest.mark.parametrize("where", ["folder", "uri"])
def test_the_latest_checkpoint_is_read_until_it_is_dropped(tmp_path: Path, uri: str, where: str) -> None:
    folder = locate(uri if where == "uri" else str(tmp_path / "deep")) / "study"
    assert read_checkpoint(folder, "a-00000") is None
    drop_checkpoint(folder, "a-00000")
    for checkpoint in (b"one", b"two" * 1000):
        write_checkpoint(folder, "a-00000", checkpoint)
        assert read_checkpoint(folder, "a-00000") == checkpoint
        assert kept_trials(folder) == {"a-00000"}
    assert read_checkpoint(folder, "a-00001") is None
    drop_checkpoint(folder, "a-00000")
    assert read_checkpoint(folder, "a-00000") is None
    assert kept_trials(folder) == set()


@pytest.mark.fault(45)
@pytest.mark.parametrize("where", ["folder", "uri"])
def test_a_study_that_was_interrupted_goes_on_from_what_was_kept(
    tmp_path: Path, uri: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its third epoch never comes to an end the first time; the second time the first two are not trained again."""
    kept = [f"scaling.checkpoints={uri}"] if where == "uri" else []
    arms = {"full": {"strategy": "full"}}
    options = [
        "search.trials=0",
        "confirm.seeds=1",
        "scaling.checkpoint_s=0",
        "train.epochs=4",
        "features.cache=none",
        *kept,
    ]
    job = toy_job(tmp_path / "study", options, arms=arms)
    report = Study.report
    before: list[float] = []
    heard: list[float] = []

    def interrupted(study: Study, records: dict) -> dict:
        if any(record.epoch == 3 for record in records.values()):
            raise KeyboardInterrupt
        before.extend(record.seconds for record in records.values())
        return report(study, records)

    monkeypatch.setattr(Study, "report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        frostline.search(job, inline=True)

    def heard_of(study: Study, records: dict) -> dict:
        heard.extend(record.seconds for record in records.values())
        return report(study, records)

    monkeypatch.setattr(Study, "report", heard_of)
    frostline.search(job, inline=True)
    assert len(heard) == 4
    assert heard[:2] == before, "the first two are those of before, in the time that they took"
    (row,) = results.read_trials(job.folder).to_pylist()
    assert (row["status"], row["epochs"]) == ("complete", 4)
    rows = results.read_epochs(job.folder).to_pylist()
    assert sorted(each["epoch"] for each in rows) == [1, 2, 3, 4]
    undisturbed = frostline.search(toy_job(tmp_path / "other" / "study", options[:5], arms=arms), inline=True)
    models = [(folder / "bundle" / "model.safetensors").read_bytes() for folder in (job.folder, undisturbed)]
    assert models[0] == models[1]
