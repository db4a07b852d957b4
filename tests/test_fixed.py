"""Jobs that train one configuration: from a job without arms, or a study's best."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import frostline
from frostline import results
from frostline.cli import main
from frostline.comparison import compare
from frostline.fixed import best_job, fixed_job
from frostline.jobfile import JobError, parse_job
from frostline.spec import Job
from frostline.testing import toy_job, toy_training


def one(folder: Path, *overrides: str) -> Job:
    freeze = {"strategy": "freeze_depth", "depth": 1}
    return toy_training(folder, overrides, name="one", freeze=freeze, train={"epochs": 2})


def test_a_configuration_is_trained_once_unless_the_job_says_more(tmp_path: Path) -> None:
    study = frostline.train(one(tmp_path / "study"), inline=True)
    (row,) = results.read_trials(study).to_pylist()
    assert (row["round"], row["arm"], row["freeze_depth"], row["epochs"]) == ("confirm", "train", 1, 2)
    assert row["test_score"] is not None
    assert (study / "bundle" / "model.safetensors").is_file()
    assert (study / "report.html").is_file()
    again = frostline.train(one(tmp_path / "study"), inline=True)
    assert results.read_trials(again).num_rows == 1, "what is trained is not trained again"
    more = frostline.train(one(tmp_path / "more", "confirm.seeds=3"), inline=True)
    rows = results.read_trials(more).to_pylist()
    assert len({row["seed"] for row in rows}) == len(rows) == 3


def test_a_job_with_arms_is_not_trained_in_place_of_a_search(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has arms to search: run `frostline search`, and then `frostline train .* --best`"
    ):
        fixed_job(toy_job(tmp_path))


def test_arms_that_are_not_searched_are_trained_and_compared(tmp_path: Path) -> None:
    arms = {"probe": {"strategy": "linear_probe"}, "full": {"strategy": "full"}}
    job = toy_job(tmp_path / "study", ["search.trials=0", "confirm.seeds=2", "train.epochs=1"], arms=arms)
    study = frostline.search(job, inline=True)
    rows = results.read_trials(study).to_pylist()
    assert [row["round"] for row in rows] == ["confirm"] * 4
    found = compare([study])
    assert {arm.arm for task in found.tasks for arm in task.arms if arm.finalist} == {"probe", "full"}


def test_what_is_searched_needs_trials(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r'arms\.freeze\.space\."train\.lr": is searched, and search\.trials is 0'):
        toy_job(tmp_path, ["search.trials=0"])
    with pytest.raises(JobError, match="nothing would be trained"):
        toy_job(tmp_path, ["search.trials=0", "confirm.seeds=0"], arms={"full": {"strategy": "full"}})


@pytest.mark.parametrize("seeds", [0, 2])
def test_the_best_configuration_of_a_study_is_trained(
    tmp_path: Path, seeds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    study = frostline.search(toy_job(tmp_path / "toy", [f"confirm.seeds={seeds}"]), inline=True)
    found = results.leaderboard(results.read_trials(study), "max")
    best = found.finalists[0] if seeds else found.trials[0]
    job = best_job(study, ["train.epochs=5"])
    assert job.name == "toy-best"
    assert job.folder == tmp_path / "toy-best"
    assert (job.train.lr, job.train.epochs, job.head.hidden) == (best["lr"], 5, best["head_hidden"])
    assert main(["train", str(study), "--best", "--inline", "train.epochs=1"]) == 0
    assert f"bundle: {tmp_path / 'toy-best' / 'bundle'}" in capsys.readouterr().out.replace("\n", "")
    (row,) = results.read_trials(tmp_path / "toy-best").to_pylist()
    assert (row["freeze_depth"], row["head_hidden"], row["lr"]) == (
        best["freeze_depth"],
        best["head_hidden"],
        best["lr"],
    )


def test_a_study_without_a_best_trial_says_so(tmp_path: Path) -> None:
    space = {"train.lr": 10.0, "train.head_lr": 10.0}
    overrides = [
        "search.trials=1",
        "train.optimizer=sgd",
        "train.weight_decay=1.0",
        "train.warmup=0.0",
        "confirm.seeds=0",
    ]
    with pytest.raises(RuntimeError):
        frostline.search(
            toy_job(tmp_path / "toy", overrides, arms={"full": {"strategy": "full", "space": space}}), inline=True
        )
    with pytest.raises(ValueError, match="no trial of .* has completed"):
        best_job(tmp_path / "toy")


def test_a_bundle_is_the_backbone_of_the_next_task(tmp_path: Path) -> None:
    """Trained from random weights on one split of the data, then the start of another training."""
    raw = one(tmp_path / "source", "train.lr=0.01").model_dump(mode="json", exclude_unset=True)
    raw["freeze"] = {"strategy": "full", "norm": "batch"}
    source = frostline.train(parse_job(raw), inline=True)
    bundle = frostline.load_bundle(source / "bundle")
    raw = one(tmp_path / "target").model_dump(mode="json", exclude_unset=True)
    raw["backbone"] = {"name": f"bundle/{source / 'bundle'}"}
    target = frostline.train(parse_job(raw), inline=True)
    facts = results.read_job(target)["facts"]
    assert facts["stages_hash"] == bundle.about["stages_hash"]
    assert facts["weights_hash"] not in (bundle.about["weights_hash"], None), (
        "what it was trained to, not where it began"
    )
    first = frostline.load_bundle(target / "bundle")
    for name, tensor in first.network.backbone.stem.state_dict().items():
        assert torch.equal(tensor, bundle.network.backbone.stem.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"frostline export .* --full --out WHOLE"):
        frostline.train(one(tmp_path / "again", f"backbone.weights={target / 'bundle'}"), inline=True)
    assert main(["export", str(target / "bundle"), "--full", "--out", str(tmp_path / "whole")]) == 0
    frostline.train(one(tmp_path / "again", f"backbone.weights={tmp_path / 'whole'}"), inline=True)
    for wrong, said in (
        (f"bundle/{tmp_path}", "is no bundle"),
        (f"bundle/{target / 'bundle'}", "leave backbone.weights out"),
    ):
        raw["backbone"] = {"name": wrong, **({} if "no bundle" in said else {"weights": "random"})}
        with pytest.raises(ValueError, match=said):
            frostline.train(parse_job({**raw, "results": str(tmp_path / "wrong")}), inline=True)
