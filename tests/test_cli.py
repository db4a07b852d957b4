"""The command line, as a stranger meets it."""

from __future__ import annotations

import json
import os
import re
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from _studies import write_study
from frostline import results
from frostline.cli import _parsed, build_parser, main
from frostline.store import Store, key_of
from frostline.testing import TOY_BACKBONE, image_folder

COMMANDS = (
    *("search", "plan", "probe", "submit", "jobs", "doctor", "cluster"),
    *("results", "compare", "report", "track", "fsck", "predict", "export", "serve", "features", "schema", "init"),
)
SMALL = ["search.trials=2", "train.epochs=2", "confirm.seeds=1", "data.image_size=16", "data.per_class=10"]
TOY = [*SMALL, f"backbone.name={TOY_BACKBONE}", "backbone.weights=random"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def job() -> str:
    assert main(["init"]) == 0
    return "job.toml"


def test_every_command_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command in text
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
        assert "usage: frostline" in capsys.readouterr().out


def test_init_writes_a_job_once(capsys: pytest.CaptureFixture[str], job: str) -> None:
    assert "next: frostline plan job.toml" in capsys.readouterr().out
    assert tomllib.loads(Path(job).read_text())["name"] == "job"
    assert main(["init"]) == 2
    assert "job.toml exists" in capsys.readouterr().err
    assert main(["init", "missing/job.toml"]) == 2


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["data"]


def test_a_search_from_init_to_results(capsys: pytest.CaptureFixture[str], job: str) -> None:
    assert main(["search", job, *TOY, "--inline"]) == 0
    shown = capsys.readouterr()
    assert "finalist" in shown.out
    assert "results/job" in shown.out
    assert "2/2 trials" in shown.err
    assert main(["results", "results/job"]) == 0
    assert "finalist" in capsys.readouterr().out
    assert (
        main(["results", "results/job", "--sql", "select round, count(*) as n from trials group by round order by 1"])
        == 0
    )
    table = capsys.readouterr().out
    assert "confirm" in table
    assert "search" in table
    assert main(["results", "results/job", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["finalists"]) == 1
    assert main(["search", job, *TOY, "search.trials=3", "--inline"]) == 0
    assert len(results.read_trials("results/job")) >= 4
    assert main(["search", job, *TOY, "search.trials=3", "train.lr=0.01", "--inline"]) == 2
    assert "train.lr: was 0.0003, now 0.01" in capsys.readouterr().err


def test_probe_says_where_to_cut_and_a_search_goes_on_from_there(capsys: pytest.CaptureFixture[str], job: str) -> None:
    assert main(["probe", job, *TOY, "--backbone", "timm/test_resnet"]) == 0
    text = "\n".join(shown(capsys))
    assert "where to cut after stage 3 of 3 (block2), head.depth=3" in text
    assert "which backbone" in text
    assert "in cross-validation on train" in text
    assert main(["probe", job, *TOY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (each,) = found["candidates"]
    assert (each["backbone"], each["images_passed"], each["best"]["cut"]) == (TOY_BACKBONE, 0, 3)
    assert {head["method"] for place in each["places"] for head in place["heads"]} == {"knn", "mean", "lda", "ridge"}
    assert not Path("results/job").exists(), "a probe is no study"


def test_a_candidate_that_cannot_be_had_is_a_mistake(capsys: pytest.CaptureFixture[str], job: str) -> None:
    assert main(["probe", job, *TOY, "--backbone", "timm/test_resnet=missing.pt"]) == 2
    error = capsys.readouterr().err
    assert "missing.pt" in error
    assert "timm/test_resnet=PATH" in error


def test_mistakes_are_listed_together_and_exit_with_2(capsys: pytest.CaptureFixture[str], job: str) -> None:
    assert main(["search", job, "train.lrr=1", "data.val=7"]) == 2
    errors = capsys.readouterr().err
    assert "job.toml: 2 mistakes" in errors
    assert "Did you mean 'lr'" in errors
    assert "data.val" in errors
    assert main(["search", "nothing.toml"]) == 2
    assert "frostline init" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.path=phtos", "phtos"),
        ("backbone.name=timm/resnet18_", "resnet18"),
        ("backbone.name=efficientnet-lite", "efficientnet-lite0"),
        ("data.per_class=5000", "per_class = 5000"),
        ('arms.freeze.space."freeze.depth"=[30]', "this backbone has"),
        ("resources.device=cuda", "resources.device"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_spent(
    capsys: pytest.CaptureFixture[str], job: str, override: str, said: str
) -> None:
    arguments = [item for item in TOY if item.partition("=")[0] != override.partition("=")[0]]
    assert main(["search", job, *arguments, override, "--inline"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("results/job/trials").exists()


def test_a_job_without_arms_has_nothing_to_search(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bare.toml").write_text('name = "bare"\n[data]\npath = "digits"\n')
    assert main(["search", "bare.toml"]) == 2
    assert "no arms to search" in (said := capsys.readouterr().err)
    assert "frostline train" in said


def test_results_of_what_is_no_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.fixture
def compared() -> str:
    scores = {"full": [0.90, 0.91, 0.93, 0.92, 0.90], "probe": [0.60, 0.62, 0.63, 0.60, 0.61]}
    return str(write_study(Path("results/strategies"), scores))


def test_compare_ends_with_a_verdict(capsys: pytest.CaptureFixture[str], compared: str) -> None:
    assert main(["compare", compared]) == 0
    assert shown(capsys)[1] == "full has the best mean test score. It is better than probe."


def test_compare_as_json_and_markdown(capsys: pytest.CaptureFixture[str], compared: str) -> None:
    assert main(["compare", compared, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"][0]["pairs"][0]["verdict"] == "better"
    assert found["tasks"][0]["studies"] == [compared]
    assert main(["compare", compared, "--markdown"]) == 0
    assert "**full has the best mean test score. It is better than probe.**" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["compare", compared, "--json", "--markdown"])
    assert left.value.code == 2


def test_compare_without_confirmations_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(Path("results/quick"), {"full": [], "probe": []})
    assert main(["compare", str(study)]) == 0
    text = " ".join(shown(capsys))
    assert "Nothing can be said of the arms" in text
    assert 'confirm.finalists = "arms" and confirm.seeds = 5' in text


def test_compare_refuses_what_cannot_be_compared(capsys: pytest.CaptureFixture[str], compared: str) -> None:
    assert main(["compare", "results/strategeis"]) == 2
    assert "Did you mean results/strategies?" in capsys.readouterr().err
    assert main(["compare", compared, compared]) == 2
    assert "name each study once" in capsys.readouterr().err
    other = write_study(Path("results/loss"), {"full": [0.5, 0.6]}, metric="nll")
    assert main(["compare", compared, str(other)]) == 2
    assert "results/loss (nll)" in capsys.readouterr().err
    job = Path(compared, "job.json")
    job.write_text(job.read_text().replace('"linear_probe"', '"melt"'))
    assert main(["compare", compared]) == 2
    assert "results/strategies/job.json was not written by a search of this version" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["compare"])
    assert left.value.code == 2


def test_compare_after_a_real_search(capsys: pytest.CaptureFixture[str], job: str) -> None:
    assert main(["search", job, *TOY, "confirm.seeds=2", "--inline"]) == 0
    capsys.readouterr()
    assert main(["compare", "results/job"]) == 0
    text = "\n".join(shown(capsys))
    assert "there is nothing to compare it with" in text
    assert "fewer than 5 seeds make wide intervals" in text


def stored(backbone: str, cut: int, view: int | None, images: int, root: str = "results/features") -> str:
    """Put activations into a store, and answer their key."""
    about = {"backbone": backbone, "cut": cut, "dtype": "float16", "view": None if view is None else {"view": view}}
    rows = np.arange(images * 24, dtype=np.float16).reshape(images, 24)
    Store(root).put(key_of(about), about, np.arange(images), rows)
    return key_of(about)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Its lines, which fit 100 columns unless they end with a path."""
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines if str(Path.cwd()) not in line)
    return [" ".join(line.split()) for line in lines]


def test_features_of_a_search_are_listed_verified_and_cleaned(capsys: pytest.CaptureFixture[str], job: str) -> None:
    assert main(["search", job, *TOY, "features.cache=all", "augment.views=2", "--inline"]) == 0
    capsys.readouterr()
    assert main(["features", "list"]) == 0
    lines = shown(capsys)
    assert "backbone cut view images MB dtype last used key" in lines
    assert any(line.startswith(f"{TOY_BACKBONE} 3 1 100 0.01 float32 ") for line in lines)
    assert main(["features", "verify"]) == 0
    assert "every byte is as it was written" in shown(capsys)
    assert main(["features", "clean"]) == 0
    assert re.fullmatch(r"deleted \d+ entries, .*[kM]B in .*/results/features", shown(capsys)[-1])
    assert main(["features", "list"]) == 0
    assert shown(capsys)[-1].startswith("0 entries, 0 bytes in ")


def test_features_say_what_network_cut_and_view_they_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    long = "timm/vit_base_patch16_clip_quickgelu_224.dfn2b_and_more"
    keys = stored(long, 12, None, 1500), stored("torchvision/resnet18\x1b[31m", 3, 4, 20)
    assert main(["features", "verify"]) == 0
    table = "\n".join(shown(capsys))
    assert re.search(rf"12 1500 0\.\d+ float16 \d{{4}}-\d\d-\d\d \d\d:\d\d {keys[0]} intact", table)
    assert re.search(rf"3 4 20 [\d.]+ float16 \S+ \S+ {keys[1]} intact", table)
    assert "2 entries, " in table
    assert "\x1b" not in table


def test_damaged_features_are_named_and_exit_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    damaged, whole = stored("a", 1, None, 30), stored("b", 2, None, 30)
    (rows,) = Path("results/features", damaged).glob("*.rows")
    content = bytearray(rows.read_bytes())
    content[7] ^= 1
    rows.chmod(0o644)
    rows.write_bytes(content)
    assert main(["features", "list"]) == 0
    capsys.readouterr()
    assert main(["features", "verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if damaged in line and rows.name not in line] == ["damaged"]
    assert [line.split()[-1] for line in lines if whole in line] == ["intact"]
    assert any(line.startswith(str(rows.absolute())) for line in lines)
    assert lines[-1] == "a search that reads them makes what is damaged anew"


def test_clean_keeps_what_is_held_or_recent(capsys: pytest.CaptureFixture[str]) -> None:
    held, old, new = (stored(name, 1, None, 8) for name in ("held", "old", "new"))
    long_ago = time.time() - 40 * 86_400
    for key in (held, old):
        os.utime(Path("results/features", key, "used"), (long_ago, long_ago))
    with Store("results/features").hold([held]):
        os.utime(Path("results/features", held, "used"), (long_ago, long_ago))
        assert main(["features", "clean", "--unused-days", "30"]) == 0
        assert {entry.key for entry in Store("results/features").entries()} == {held, new}
        said = shown(capsys)
        assert said[0].startswith("deleted 1 entry, ")
        assert re.fullmatch(r"kept 2 entries, .*, in use or used within 30 days", said[1])
        assert main(["features", "clean"]) == 0
        assert re.fullmatch(r"kept 1 entry, .*, in use", shown(capsys)[-1])
    assert main(["features", "clean"]) == 0
    assert not [*Path("results/features").iterdir()]


def test_a_feature_store_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    for root in ("nowhere", "file"):
        for what in ("list", "verify", "clean"):
            assert main(["features", what, root]) == 2
            assert re.search(rf"{root} is not a folder.*features.path", capsys.readouterr().err)
    assert main(["features", "list", "ftp://host/features"]) == 2
    assert "no file system is known for ftp://" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["clean", "--unused-days", "-1"], ["list", "--unused-days"], ["prune"]])
def test_features_refuse_what_they_cannot_honour(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["features", *arguments])
    assert left.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def photographs(root: Path) -> Path:
    """Real photographs: pieces of scikit-learn's palace and flower, as JPEG files in a folder a class."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for name, photo in zip(("palace", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir(parents=True)
        for index in range(24):
            top, left = rng.integers(0, photo.shape[0] - 128), rng.integers(0, photo.shape[1] - 128)
            Image.fromarray(photo[top : top + 128, left : left + 128]).save(root / name / f"{index}.jpg")
    return root


@pytest.mark.parametrize("backbone", ["timm/resnet10t", "torchvision/mobilenet_v3_small"])
def test_an_image_folder_and_another_backbone_need_two_overrides(job: str, backbone: str) -> None:
    photographs(Path("photos"))
    small = ["search.trials=2", "train.epochs=1", "confirm.seeds=1", "data.image_size=32"]
    command = ["search", job, *small, "backbone.weights=random", "data.path=photos", f"backbone.name={backbone}"]
    assert main([*command, "--inline"]) == 0
    rows = results.read_trials("results/job").to_pylist()
    assert {row["status"] for row in rows} == {"complete"}
    assert json.loads(rows[0]["spec"])["data"]["path"] == str(Path("photos").absolute())


def test_weights_from_a_local_file(job: str) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), "mine.safetensors")
    image_folder(Path("shapes"))
    small = ["search.trials=1", "train.epochs=1", "confirm.seeds=0", "data.image_size=32", "data.path=shapes"]
    assert (
        main(["search", job, *small, "backbone.name=timm/resnet10t", "backbone.weights=mine.safetensors", "--inline"])
        == 0
    )
    assert (
        main(
            [
                "search",
                job,
                *small,
                "backbone.name=timm/resnet18",
                "backbone.weights=mine.safetensors",
                "name=b",
                "--inline",
            ]
        )
        == 2
    )


def test_overrides_may_stand_behind_options() -> None:
    words = ["train", "job.toml", "--inline", "train.lr=1e-3", "confirm.seeds=2"]
    assert _parsed(words).overrides == ["train.lr=1e-3", "confirm.seeds=2"]
    for wrong in (["results", "study", "a=b"], ["train", "job.toml", "--inline", "--wrong=1"]):
        with pytest.raises(SystemExit):
            _parsed(wrong)
